"""The figure of many rules: each one's aggregation error and score, named where its line ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from simulations.figures import EXACT, MARKERS, OKABE_ITO, by_round, dashes, log_ticks, sheet
from simulations.report import grouped
from simulations.run_folders import Run

MANY = len(OKABE_ITO)  # rows beyond which colours come round again and a legend is a puzzle
NOTHING = 1e-9  # where an error of 0 is drawn, below what float32 factors leave
LONGEST = 40  # letters of a name that leave room for the lines
GAP = 0.19  # inches from one name to the next
Numbers = NDArray[numpy.float64]


@dataclass(frozen=True)
class Curve:
    """One row's line: its mean over the seeds, and its place among the rows, which is its look."""

    name: str
    place: int
    x: Numbers
    y: Numbers
    least: Numbers
    greatest: Numbers

    @property
    def look(self) -> dict[str, Any]:  # Any: matplotlib's keywords
        """Colour, marker and dashes, which no other of 32 rows has all of."""
        return {
            "color": OKABE_ITO[self.place % len(OKABE_ITO)],
            "marker": MARKERS[self.place % len(MARKERS)],
            "linestyle": dashes(self.place),
        }


def rules(runs: Sequence[Run], path: Path) -> bool:
    """Draw the rows of runs, if they are more than ``MANY`` with names that fit; whether they are.

    Left, the aggregation error by round on logarithmic axes, that of exact rules on one of their
    own; right, mean accuracy, or perplexity for language models.
    """
    groups = grouped(runs)
    if len(groups) <= MANY or max(map(len, groups)) > LONGEST:
        return False
    language = all(run.language for run in runs)
    score, title = ("perplexity", "Perplexity") if language else ("mean", "Mean accuracy")
    errors, scores = found(groups, "aggregation_error", 1), found(groups, score, 0)
    exact = [curve for curve in errors if bool((curve.greatest <= EXACT).all())]
    others = [curve for curve in errors if curve not in exact]
    panels = [(others, "Aggregation error"), (exact, "exact but for rounding")]
    panels = [(curves, title) for curves, title in panels if curves]
    shares = [len(curves) + 2.5 for curves, _ in panels] or [1.0]
    with sheet(path, 12, 1.2 + GAP * 1.15 * max(len(groups) + 4, sum(shares))) as figure:
        grid = figure.add_gridspec(len(shares), 2, height_ratios=shares)
        drawn = [(figure.add_subplot(grid[:, 1]), scores, title)]
        for row, (curves, heading) in enumerate(panels):
            axes = figure.add_subplot(grid[row, 0])
            _logarithmic(axes, [value for curve in curves for value in curve.y])
            drawn.append((axes, curves, heading))
        for axes, curves, heading in drawn:
            _draw(axes, curves, heading)
        figure.draw_without_rendering()  # so that the axes have their sizes
        for axes, curves, _ in drawn:
            _name(figure, axes, curves)
    return True


def found(groups: Mapping[str, Sequence[Run]], name: str, first: int) -> list[Curve]:
    """Each row's line of one number, cut to the rounds that all its seeds have."""
    curves = []
    for place, (row, runs) in enumerate(groups.items()):
        lines = [by_round(run, name, first) for run in runs]
        length = min(len(y) for _, y in lines)
        if not length:
            continue
        y = numpy.stack([y[:length] for _, y in lines])  # [seeds, rounds]
        y = numpy.where(numpy.isfinite(y), y, numpy.nan)
        if name == "aggregation_error":
            y = numpy.maximum(y, NOTHING)
        curves.append(Curve(row, place, lines[0][0][:length], y.mean(0), y.min(0), y.max(0)))
    return curves


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 as near to those wanted as ``gap`` between any two allows, in order.

    >>> spread([0.5, 0.5, 0.9], 0.25)
    [0.375, 0.625, 0.875]
    """

    def middle(members: Sequence[int]) -> float:
        half = gap * len(members) / 2
        return max(half, min(1 - half, sum(wanted[i] for i in members) / len(members)))

    blocks: list[list[int]] = []  # of those that touch
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        blocks.append([index])
        while len(blocks) > 1:
            low, high = blocks[-2:]
            if middle(high) - middle(low) >= gap * (len(low) + len(high)) / 2:
                break
            blocks[-2:] = [low + high]
    places = [0.0] * len(wanted)
    for block in blocks:
        for step, index in enumerate(block):
            places[index] = middle(block) + gap * (step - (len(block) - 1) / 2)
    return places


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of whole powers of ten around the values, one at least."""
    powers = numpy.log10([value for value in values if numpy.isfinite(value)] or [1.0])
    low, high = numpy.floor(powers.min()), numpy.ceil(powers.max())
    limits = (10.0**low, 10.0 ** max(high, low + 1))
    axes.set_yscale("log")
    axes.set_yticks(ticks := log_ticks(limits), [f"{tick:g}" for tick in ticks])
    axes.set_ylim(*limits)
    axes.yaxis.set_minor_locator(NullLocator())


def _draw(axes: Axes, curves: Sequence[Curve], title: str) -> None:
    """The lines with their bands."""
    for curve in curves:
        axes.plot(curve.x, curve.y, **curve.look, linewidth=1.5, zorder=3)
        if (curve.least != curve.greatest).any():
            colour = curve.look["color"]
            axes.fill_between(
                curve.x, curve.least, curve.greatest, color=colour, alpha=0.12, linewidth=0
            )
    axes.set_title(title)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _name(figure: Figure, axes: Axes, curves: Sequence[Curve]) -> None:
    """Each line's name beside its end, in the order of the ends, with a thread to it."""
    shown = [curve for curve in curves if numpy.isfinite(curve.y[-1])]
    height = axes.get_window_extent().height / figure.dpi
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((curve.x[-1], curve.y[-1])) for curve in shown]
    for curve, end, place in zip(
        shown, ends, spread([end[1] for end in ends], GAP / height), strict=True
    ):
        colour = curve.look["color"]
        axes.plot(
            [end[0], 1.04, 1.07],
            [end[1], place, place],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.8,
            clip_on=False,
        )
        axes.plot(1.07, place, **curve.look, transform=axes.transAxes, clip_on=False)
        axes.annotate(
            curve.name,
            (1.09, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            color="#222222",
        )
