"""The figure of a grid: the score of each method after the last round, setting by setting."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from simulations.figures import MARKERS, OKABE_ITO, dashes, sheet
from simulations.report import IGNORED, flattened, whole
from simulations.run_folders import Run, pick
from simulations.trade_off import scores as by_epsilon

MOST = 12  # settings that have room beside each other
WIDEST = 22  # letters of a tick's line
RATE = "train.learning_rate"
SPREAD = 0.6  # of the room between two settings, over which the methods' dots are spread
Settings = Mapping[str, Any]  # Any: values of a config, by dotted key
Scores = Mapping[str, Mapping[int, Sequence[float]]]  # by method: place of the setting, each seed's


def settings(runs: Sequence[Run]) -> tuple[list[Settings], Scores]:
    """What differs within a method, in order of appearance, and each method's scores by it.

    A key that tells methods apart and no two runs of one method, such as an option of its own, is
    of the method and of no setting; so is a learning rate that a method has for each setting.
    """
    flat = [
        flattened({key: value for key, value in whole(run.config).items() if key not in IGNORED})
        for run in runs
    ]
    by_method: dict[str, list[Settings]] = {}
    for config in flat:
        by_method.setdefault(str(config.get("method", "?")), []).append(config)
    keys = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if any(len({_text(c.get(key)) for c in members}) > 1 for members in by_method.values())
    ]
    others = [key for key in keys if key != RATE]
    if all(_kinds(members, keys) == _kinds(members, others) for members in by_method.values()):
        keys = others
    places: dict[str, int] = {}
    found: list[Settings] = []
    scores: dict[str, dict[int, list[float]]] = {}
    for run, config in zip(runs, flat, strict=True):
        own = {key: config.get(key) for key in keys}
        place = places.setdefault(_text(own), len(found))
        if place == len(found):
            found.append(own)
        score = pick(run.last, "perplexity" if run.language else "mean")
        if score is not None:
            of_method = scores.setdefault(str(config.get("method", "?")), {})
            of_method.setdefault(place, []).append(score)
    return found, scores


def _kinds(configs: Sequence[Settings], keys: Sequence[str]) -> int:
    """How many of them these keys tell apart."""
    return len({_text([config.get(key) for key in keys]) for config in configs})


def grid(runs: Sequence[Run], path: Path) -> bool:
    """Draw the score of each method by setting, if there are several; whether there are.

    A line joins a method's means over seeds, a dot is one seed. Runs that differ in epsilon alone
    have a figure of their own, see ``trade_off``.
    """
    found, scores = settings(runs)
    if not 2 <= len(found) <= MOST or by_epsilon(runs):
        return False
    places = _in_order(found)
    language = all(run.language for run in runs)
    labels = [_label(one) for one in found]
    lines = max(label.count("\n") for label in labels)
    with sheet(path, min(11.0, 3.4 + 1.5 * len(found)), 4.2 + 0.16 * lines) as figure:
        axes = figure.subplots()
        for number, (method, by_place) in enumerate(scores.items()):
            shift = SPREAD * ((number + 0.5) / len(scores) - 0.5)
            _draw(axes, number, method, {places[p] + shift: v for p, v in by_place.items()})
        axes.set_xticks([places[p] for p in range(len(found))], labels)
        axes.grid(visible=False, axis="x")
        axes.set_title(f"{'Perplexity' if language else 'Mean accuracy'} after the last round")
        if len(found[0]) == 1:
            axes.set_xlabel(next(iter(found[0])))
        figure.legend(frameon=False, loc="outside right upper")
    return True


def _draw(axes: Axes, number: int, method: str, points: Mapping[float, Sequence[float]]) -> None:
    """One method's line and dots."""
    colour, ordered = OKABE_ITO[number % len(OKABE_ITO)], dict(sorted(points.items()))
    axes.plot(
        list(ordered),
        [statistics.fmean(values) for values in ordered.values()],
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        linestyle=dashes(number),
        linewidth=1,
        markersize=7,
        label=method,
    )
    for x, values in ordered.items():
        axes.vlines(x, min(values), max(values), color=colour, linewidth=1)
        axes.scatter([x] * len(values), values, s=9, color=colour, zorder=3)


def _in_order(found: Sequence[Settings]) -> dict[int, int]:
    """Where each setting stands: numbers in the order of the first of them, else as they appear."""
    order = list(range(len(found)))
    if all(isinstance(value, int | float) for one in found for value in one.values()):
        order.sort(key=lambda place: [float(value) for value in found[place].values()])
    return {place: rank for rank, place in enumerate(order)}


def _label(one: Settings) -> str:
    """A setting under its tick: the value of the only key, or a line for each key."""
    if len(one) == 1:
        return _short(next(iter(one.values())))
    lines = (f"{key.rpartition('.')[2]} {_short(value)}" for key, value in one.items() if value)
    return "\n".join(lines)


def _short(value: object) -> str:
    """A value as people write it, cut where it is long."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 2] + " …"


def _text(value: object) -> str:
    """Equal for equal values of a config."""
    return json.dumps(value, sort_keys=True, default=str)
