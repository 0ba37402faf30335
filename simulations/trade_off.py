"""What privacy costs: accuracy against epsilon, a line for each method."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from simulations.figures import MARKERS, OKABE_ITO, sheet
from simulations.report import IGNORED, alike
from simulations.run_folders import Run, pick

Scores = Mapping[float, Sequence[float]]  # epsilon, infinite without privacy: accuracy of each seed
TUNED = ("privacy", "train")  # tables of a config that may differ along a line
TARGETS = ("epsilon", "noise_multiplier")  # keys of [privacy] that give a run its place
APART = 0.025  # of the axis, between lines, so that their dots do not hide each other


def scores(runs: Sequence[Run]) -> dict[str, Scores]:
    """Each line's mean accuracy over the groups after the last round, by epsilon; or no lines.

    There are none unless epsilon differs between the runs and is all in ``[privacy]`` that does:
    an epsilon at another delta or for another unit has no place on the same axis. ``[train]``
    may differ between the epsilons of a line, where each has a learning rate of its own, but not
    at one of them.
    """
    if len({_kind(run) for run in runs} - {""}) != 1 or len({_epsilon(run) for run in runs}) < 2:
        return {}
    lines: dict[str, Scores] = {}
    for name, members in alike(runs, (*IGNORED, *TUNED)).items():
        points: dict[float, list[float]] = {}
        for run in members:
            epsilon, accuracy = _epsilon(run), pick(run.last, "mean")
            if epsilon is None or accuracy is None:
                return {}
            points.setdefault(epsilon, []).append(accuracy)
        if len(alike(members)) > len(points):
            return {}
        lines[name] = dict(sorted(points.items()))
    return lines


def trade_off(runs: Sequence[Run], path: Path) -> bool:
    """Draw ``scores`` and return True, or return False where there are none.

    A line joins the means over seeds, a dot is one seed, a bar reaches from the least to the
    greatest. Runs without privacy stand at the right end, apart from the logarithmic axis.
    """
    lines = scores(runs)
    if not lines:
        return False
    ticks = sorted({epsilon for points in lines.values() for epsilon in points})
    places = places_of(ticks)
    with sheet(path, 6.5, 4.5) as figure:
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            colour = OKABE_ITO[number % len(OKABE_ITO)]
            shift = APART * (number - (len(lines) - 1) / 2)
            x = [places[epsilon] + shift for epsilon in points]
            y = [statistics.fmean(values) for values in points.values()]
            finite = sum(map(math.isfinite, points))
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(x[:finite], y[:finite], color=colour)
            axes.plot(x[finite - 1 :], y[finite - 1 :], color=colour, linestyle=":")
            axes.plot(x, y, color=colour, marker=marker, linestyle="", markersize=7, label=name)
            for place, values in zip(x, points.values(), strict=True):
                axes.vlines(place, min(values), max(values), color=colour, linewidth=1)
                axes.scatter([place] * len(values), values, s=9, color=colour, zorder=3)
        axes.set_xticks(
            [places[epsilon] for epsilon in ticks],
            [f"{epsilon:g}" if math.isfinite(epsilon) else "no privacy" for epsilon in ticks],
        )
        axes.set_title("Mean accuracy after the last round")
        axes.set_xlabel(axis_label(runs))
        figure.legend(frameon=False, loc="outside right upper")
    return True


def places_of(epsilons: Sequence[float]) -> dict[float, float]:
    """Where each epsilon stands between 0 and 1: by its logarithm, an infinite one at the end."""
    logs = {epsilon: math.log(epsilon) for epsilon in epsilons if math.isfinite(epsilon)}
    low, high = min(logs.values()), max(logs.values())
    width, end = high - low or 1.0, 0.75 if math.inf in epsilons else 1.0
    return {**{e: end * (log - low) / width for e, log in logs.items()}, math.inf: 1.0}


def axis_label(runs: Sequence[Run]) -> str:
    """Epsilon with the delta and the unit it holds for."""
    (kind,) = {_kind(run) for run in runs} - {""}
    privacy = json.loads(kind)
    return f"epsilon at delta {privacy.get('delta')}, for each {privacy['unit']} (log scale)"


def _epsilon(run: Run) -> float | None:
    """A run's target; infinite without privacy, None where the noise was given instead."""
    if not _kind(run):
        return math.inf
    target = run.config["privacy"].get("epsilon")
    return None if target is None else float(target)


def _kind(run: Run) -> str:
    """What a run's epsilon is an epsilon of: all of ``[privacy]`` but the target; or nothing."""
    privacy = run.config.get("privacy", {})
    if privacy.get("unit", "none") == "none":
        return ""
    return json.dumps({k: v for k, v in privacy.items() if k not in TARGETS}, sort_keys=True)
