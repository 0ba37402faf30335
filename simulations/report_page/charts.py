"""What the page's charts show, as plain data that its script draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simulations.figures import EXACT, Line, by_bytes, by_round, line
from simulations.report_page.comparison import Comparison
from simulations.run_folders import Run, pick
from simulations.trade_off import axis_label, places_of, scores

BY_LAYER = "aggregation_error_by_layer"  # of a record, where it has one: error by layer's name
Chart = dict[str, Any]  # Any: JSON values of several kinds


def charts(found: Comparison, runs: Sequence[Run]) -> list[Chart]:
    """All charts that the runs have numbers for, in the order of the page.

    A chart of kind ``lines`` has points [x, y, least, greatest], one of kind ``dots`` the number
    of a category for x. y is the mean over seeds, with the least and the greatest of them.
    """
    language = all(run.language for run in runs)
    score, label = ("perplexity", "perplexity") if language else ("mean", "mean accuracy")
    second, name = ("loss", "loss") if language else ("worst", "accuracy of the worst group")
    sent = "MB up and down, all clients"
    chosen = [
        _over(found, "learning", f"{label} by round", label, lambda run: by_round(run, score)),
        _over(found, "worst", f"{name} by round", name, lambda run: by_round(run, second)),
        _over(found, "bytes", f"{label} by megabytes", label, lambda r: by_bytes(r, score), sent),
        _over(found, "clock", f"{label} by virtual time", label, _by_clock(score), "virtual hours"),
        _epsilon(found, runs),
        _error(found),
        _by_layer(found),
        _groups(found, language),
    ]
    return [chart for chart in chosen if chart]


def _over(
    found: Comparison,
    name: str,
    title: str,
    label: str,
    read: Callable[[Run], Line],
    across: str = "round",
) -> Chart:
    """A line for each row that has the number; or nothing."""
    lines = []
    for place, members in enumerate(found.runs.values()):
        points = _points([read(run) for run in members])
        if points:
            lines.append({**_named(found, place), "points": points})
    if not lines:
        return {}
    return {
        "id": name,
        "kind": "lines",
        "title": title[0].upper() + title[1:],
        "x": {"label": across, "whole": across == "round"},
        "y": {"label": label},
        "lines": lines,
    }


def _by_clock(score: str) -> Callable[[Run], Line]:
    """Reads a score over virtual hours; nothing of a run without a virtual clock."""

    def read(run: Run) -> Line:
        pairs = zip(run.values("virtual_seconds"), run.values(score), strict=True)
        return line([(x / 3600, y) for x, y in pairs if x is not None and y is not None])

    return read


def _points(lines: Sequence[Line]) -> list[list[float]]:
    """Mean, least and greatest over seeds, as far as all seeds have come."""
    known = [line for line in lines if len(line[0])]
    length = min((len(x) for x, _ in known), default=0)
    points = []
    for place in range(length):
        y = [float(line[1][place]) for line in known]
        if all(map(math.isfinite, y)):
            x = statistics.fmean(float(line[0][place]) for line in known)
            points.append([x, statistics.fmean(y), min(y), max(y)])
    return points


def _error(found: Comparison) -> Chart:
    """Aggregation error by round on a logarithmic axis with a floor for what is exact."""
    chart = _over(
        found,
        "error",
        "Aggregation error by round",
        "aggregation error, log scale",
        lambda run: by_round(run, "aggregation_error", first=1),
    )
    if chart:
        chart["y"] |= _log(chart["lines"])
        chart["note"] = (
            "How far the merged weight change is from the mean of the clients', relative to it."
        )
    return chart


def _log(lines: Sequence[Chart]) -> Chart:
    """A logarithmic axis whose floor stands for all that is exact up to rounding."""
    errors = [point[1] for line in lines for point in line["points"] if point[1] > EXACT]
    return {"log": True, "floor": min(errors, default=1.0) / 10, "exact": EXACT}


def _by_layer(found: Comparison) -> Chart:
    """The last round's aggregation error in each layer; nothing unless records tell it."""
    names = list(
        dict.fromkeys(
            str(layer)
            for members in found.runs.values()
            for run in members
            for layer in run.last.get(BY_LAYER) or {}
        )
    )
    lines = _dots(found, names, lambda run, layer: (run.last.get(BY_LAYER) or {}).get(layer))
    if not lines:
        return {}
    return {
        "id": "layers",
        "kind": "dots",
        "title": "Aggregation error by layer, last round",
        "note": "Layers by those parts of their names in which they differ.",
        "x": {"label": "aggregation error, log scale", **_log(lines)},
        "categories": short_names(names),
        "lines": lines,
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names of one length without the parts that all have in common; others as they are.

    A name keeps its last part if it has nothing else to tell.
    """
    parts = [name.split(".") for name in names]
    if len({len(one) for one in parts}) != 1:
        return [*names]
    differ = [place for place, found in enumerate(zip(*parts, strict=True)) if len(set(found)) > 1]
    return [".".join(one[place] for place in differ) or one[-1] for one in parts]


def _groups(found: Comparison, language: bool) -> Chart:
    """Accuracy, or perplexity, of each group and of the worst after the last round."""
    groups = list(dict.fromkeys(group for row in found.rows for group in row.groups))
    if not groups:
        return {}
    worst, score = "worst group", "perplexity" if language else "accuracy"

    def read(run: Run, name: str) -> float | None:
        values: dict[str, float] = run.last.get("perplexities" if language else "groups", {})
        if name != worst:
            return values.get(name)
        return max(values.values(), default=None) if language else pick(run.last, "worst")

    lines = _dots(found, [*groups, worst], read)
    return {
        "id": "groups",
        "kind": "dots",
        "title": f"{score.capitalize()} by group, last round",
        "x": {"label": score},
        "categories": [*groups, worst],
        "lines": lines,
    }


def _dots(
    found: Comparison, names: Sequence[str], read: Callable[[Run, str], float | None]
) -> list[Chart]:
    """Each row's number in each category that all its runs have."""
    lines = []
    for place, members in enumerate(found.runs.values()):
        points = []
        for number, name in enumerate(names):
            values = [value for run in members if (value := read(run, name)) is not None]
            if len(values) == len(members) and all(map(math.isfinite, values)):
                points.append([number, statistics.fmean(values), min(values), max(values)])
        if points:
            lines.append({**_named(found, place), "points": points})
    return lines


def _epsilon(found: Comparison, runs: Sequence[Run]) -> Chart:
    """Accuracy against epsilon, where that is all of the promise that differs."""
    lines = scores(runs)
    if not lines:
        return {}
    ticks = sorted({epsilon for points in lines.values() for epsilon in points})
    places = places_of(ticks)
    words = {e: f"{e:g}" if math.isfinite(e) else "none" for e in ticks}
    return {
        "id": "epsilon",
        "kind": "lines",
        "title": "Mean accuracy against epsilon",
        "note": "“None” is without privacy, and apart from the logarithmic axis.",
        "x": {"label": axis_label(runs), "ticks": [[places[e], words[e]] for e in ticks]},
        "y": {"label": "mean accuracy"},
        "lines": [
            {
                "name": name,
                "rule": name.partition(" (")[0],
                "place": place,
                "row": None,
                "points": _by_epsilon(points, places),
            }
            for place, (name, points) in enumerate(lines.items())
        ],
    }


def _by_epsilon(
    points: Mapping[float, Sequence[float]], places: Mapping[float, float]
) -> list[list[float]]:
    """Mean, least and greatest at each epsilon."""
    return [[places[e], statistics.fmean(y), min(y), max(y)] for e, y in points.items()]


def _named(found: Comparison, place: int) -> Chart:
    """Which row a line shows; ``place`` gives its colour and marker."""
    name, rule = found.names[place], found.rules[place]
    return {"name": name, "rule": rule, "place": place, "row": place}
