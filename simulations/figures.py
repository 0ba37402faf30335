"""Figures: how runs went over their rounds, and how data is dealt to clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedlora.disk import writing
from simulations.report import grouped
from simulations.run_folders import Run

if TYPE_CHECKING:  # partition.py loads the data libraries, which no curve needs
    from fedlora.partition import SkewRow
    from fedlora.privacy import PrivacyEvent

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
LOOKS: dict[Any, Any] = {  # Any: matplotlib types the keys as one long Literal
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#888888",
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "svg.hashsalt": "fedlora",  # so that the same runs give the same file
}
EXACT = 1e-6  # float32 factors leave about 1e-7 where a rule is exact
Line = tuple[NDArray[numpy.float64], NDArray[numpy.float64]]  # one run's x and y


@contextmanager
def sheet(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the house's look, so many inches large, saved to ``path`` at the end."""
    with rc_context(LOOKS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with writing(path):
            undated = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=undated)


def legend_room(names: Collection[str]) -> tuple[int, float]:
    """In how many columns a legend fits below a figure, and the inches that it takes."""
    columns = 1 if max(map(len, names)) > 40 else min(4, len(names))
    return columns, 0.22 * math.ceil(len(names) / columns)


def curves(runs: Sequence[Run], path: Path) -> None:
    """Four panels over the rounds: score, worst group, aggregation error, score by megabytes.

    A line is the mean over a method's seeds, the band reaches from the least to the greatest.
    For language models, perplexity and loss stand where accuracy does not exist.
    """
    groups = grouped(runs)
    language = all(run.language for run in runs)
    score, label = ("perplexity", "Perplexity") if language else ("mean", "Mean accuracy")
    second, second_label = ("loss", "Loss") if language else ("worst", "Accuracy of worst group")
    columns, height = legend_room(groups)
    with sheet(path, 9, 6.8 + height) as figure:
        panels = figure.subplots(2, 2)
        panel(panels[0, 0], groups, label, lambda run: by_round(run, score))
        panel(panels[0, 1], groups, second_label, lambda run: by_round(run, second))
        _error_panel(panels[1, 0], groups)
        panel(
            panels[1, 1],
            groups,
            f"{label} by megabytes sent",
            lambda run: by_bytes(run, score),
            "MB up and down, all clients",
        )
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def skew(rows: Sequence[SkewRow], path: Path, title: str) -> None:
    """Stacked bars of each client's labels, and beside them of its groups when there are any."""
    parts = [("Labels", [row.labels for row in rows])]
    if len({group for row in rows for group in row.groups}) > 1:
        parts.append(("Groups", [row.groups for row in rows]))
    clients = [row.client for row in rows]
    with sheet(path, 9, 4.2) as figure:
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for panel, (heading, counts) in zip(panels, parts, strict=True):
            _stacked(panel, clients, counts)
            panel.set_title(heading)
        panels[0].set_ylabel("examples")
        figure.suptitle(title, x=0.01, ha="left", weight="bold")


def spending(
    lines: Mapping[str, Sequence[tuple[int, float]]], target: float | None, path: Path, title: str
) -> None:
    """Epsilon after each round, a line for each client, under the target if there is one."""
    with sheet(path, 6, 4) as figure:
        axes = figure.subplots()
        for place, (name, points) in enumerate(lines.items()):
            x, y = zip(*[(0, 0.0), *points], strict=True)
            axes.plot(x, y, color=OKABE_ITO[place], marker=MARKERS[place], label=name)
        if target is not None:
            axes.axhline(target, color="#666666", linestyle="--", linewidth=1)
            axes.annotate("target", (0, target), xytext=(2, 3), textcoords="offset points")
        axes.set(title=title, xlabel="round", ylabel="epsilon", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend(frameon=False, loc="lower right")


def audited(
    scores: NDArray[numpy.float64],
    included: NDArray[numpy.bool_],
    noise: NDArray[numpy.float64],
    event: PrivacyEvent,
    path: Path,
) -> None:
    """Canaries' scores, those inside and those outside, and released noise over what is claimed."""
    mean, deviation = event.steps * event.sample_rate, event.noise_multiplier * event.steps**0.5
    wider = (deviation**2 + mean * (1 - event.sample_rate)) ** 0.5
    with sheet(path, 9, 4) as figure:
        left, right = figure.subplots(1, 2)
        _bell(left, scores[~included], 0.0, deviation, 0, "left out")
        _bell(left, scores[included], mean, wider, 1, "put in")
        _bell(right, noise.ravel(), 0.0, 1.0, 2, "released")
        left.set(title="Scores of canaries", xlabel="clips")
        right.set(title="Released noise", xlabel="claimed deviations")
        for axes in (left, right):
            axes.set_yticks([])
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _bell(
    axes: Axes, found: NDArray[numpy.float64], mean: float, deviation: float, place: int, name: str
) -> None:
    """A histogram under the curve that is claimed for it."""
    colour = OKABE_ITO[place]
    axes.hist(found, bins=60, density=True, color=colour, alpha=0.35, label=name)
    x = numpy.linspace(mean - 4 * deviation, mean + 4 * deviation, 200)
    y = numpy.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    axes.plot(x, y, color=colour, label=f"{name}, as claimed")


def panel(
    axes: Axes,
    groups: Mapping[str, list[Run]],
    title: str,
    read: Callable[[Run], Line],
    across: str = "round",
) -> None:
    """One line with its band for each method."""
    for place, (name, runs) in enumerate(groups.items()):
        lines = [line for line in map(read, runs) if len(line[0])]
        if lines:
            _draw(axes, place, name, lines)
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(integer=across == "round", nbins=8))


def _draw(axes: Axes, place: int, name: str, lines: Sequence[Line]) -> None:
    """The mean line over seeds and its band, cut to the rounds that all seeds have."""
    length = min(len(y) for _, y in lines)
    x = numpy.mean([x[:length] for x, _ in lines], axis=0)
    y = numpy.stack([y[:length] for _, y in lines])  # [seeds, rounds]
    colour = OKABE_ITO[place % len(OKABE_ITO)]
    axes.plot(
        x,
        y.mean(axis=0),
        color=colour,
        marker=MARKERS[place % len(MARKERS)],
        linestyle=dashes(place),
        label=name,
        clip_on=False,
        zorder=3,
    )
    if len(lines) > 1:
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def dashes(place: int) -> str:
    """How a line is drawn, so that colours may come round again."""
    return ("-", "--", ":", "-.")[place // len(OKABE_ITO) % 4]


def _error_panel(axes: Axes, groups: Mapping[str, list[Run]]) -> None:
    """Aggregation error on a logarithmic axis; what is exact lies on the floor, so labelled."""
    errors = [
        value
        for runs in groups.values()
        for run in runs
        for value in by_round(run, "aggregation_error", first=1)[1]
        if EXACT < value < numpy.inf
    ]
    floor = min(errors, default=1.0) / 10

    def read(run: Run) -> Line:
        x, y = by_round(run, "aggregation_error", first=1)
        return x, numpy.where(y <= EXACT, floor, y)

    panel(axes, groups, "Aggregation error", read)
    axes.set_yscale("log")
    axes.set_yticks(ticks := log_ticks(errors), [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=floor / 1.5)
    if any(floor in read(run)[1] for runs in groups.values() for run in runs):
        axes.axhline(floor, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "exact",
            (1, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            color="#555555",
        )


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values, with 2 and 5 of each where there are few powers."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if min(values) / 3 < tick < max(values) * 3]


def by_round(run: Run, name: str, first: int = 0) -> Line:
    """One number over the rounds that have it."""
    pairs = [
        (record["round"], value)
        for record, value in zip(run.rounds, run.values(name), strict=True)
        if value is not None and record["round"] >= first
    ]
    return line(pairs)


def by_bytes(run: Run, name: str) -> Line:
    """One number over the megabytes that all rounds up to it have sent, both ways."""
    pairs, sent = [], 0.0
    for record, value in zip(run.rounds, run.values(name), strict=True):
        sent += (record.get("bytes_up", 0) + record.get("bytes_down", 0)) / 1e6
        if value is not None:
            pairs.append((sent, value))
    return line(pairs)


def line(pairs: Sequence[tuple[float, float]]) -> Line:
    """Pairs as two arrays."""
    table = numpy.array(pairs, dtype=numpy.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _stacked(axes: Axes, clients: Sequence[int], counts: Sequence[Mapping[str, int]]) -> None:
    """One bar for each client, one colour for each name."""
    names = list(dict.fromkeys(name for count in counts for name in count))
    bottom = numpy.zeros(len(clients))
    places = numpy.arange(len(clients))
    for place, name in enumerate(names):
        heights = numpy.array([count.get(name, 0) for count in counts], dtype=numpy.float64)
        hatch = "" if place < len(OKABE_ITO) else "//"
        colour = OKABE_ITO[place % len(OKABE_ITO)]
        axes.bar(
            places, heights, bottom=bottom, label=name, color=colour, hatch=hatch, edgecolor="white"
        )
        bottom += heights
    axes.margins(y=0.08)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("client")
    if len(clients) <= 20:
        axes.set_xticks(places, [str(client) for client in clients])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
