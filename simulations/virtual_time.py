"""The figure of runs on a virtual clock: their score by virtual time, and by what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simulations.figures import Line, by_bytes, legend_room, line, panel, sheet
from simulations.report import grouped
from simulations.run_folders import Run

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def virtual_time(runs: Sequence[Run], path: Path) -> bool:
    """Draw the rows of runs, if all have a virtual clock; whether they have.

    Left, mean accuracy (perplexity for language models) by virtual time; right, by megabytes.
    """
    ends = [run.values("virtual_seconds")[-1] for run in runs]
    known = [end for end in ends if end is not None]
    if not known or len(known) < len(ends):
        return False
    unit, name = next((u for u in UNITS if max(known) >= 2 * u[0]), UNITS[-1])
    language = all(run.language for run in runs)
    score, label = ("perplexity", "Perplexity") if language else ("mean", "Mean accuracy")
    groups = grouped(runs)

    def by_clock(run: Run) -> Line:
        pairs = zip(run.values("virtual_seconds"), run.values(score), strict=True)
        return line([(x / unit, y) for x, y in pairs if x is not None and y is not None])

    columns, height = legend_room(groups)
    with sheet(path, 9, 3.8 + height) as figure:
        left, right = figure.subplots(1, 2)
        panel(left, groups, f"{label} by virtual time", by_clock, f"virtual {name}")
        across = "MB up and down, all clients"
        panel(right, groups, f"{label} by megabytes", lambda run: by_bytes(run, score), across)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return True
