"""``fedlora reproduce``: run again what made a committed result, and hold it against that."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, unknown
from simulations.commands import overrides, watched
from simulations.recipe import Recipe
from simulations.report import Row, Stat, grouped, rows
from simulations.run_folders import Run, collect
from simulations.sweep import Cell, named
from simulations.sweeping import run_sweep

NUMBERS = ("mean", "perplexity", "loss")  # of the last round
ROUNDING = 1e-6  # relative; another machine may add in another order


@dataclass(frozen=True)
class Compared:
    """One number of one row, as committed and as found now.

    Attributes:
        row, number: which.
        seeds: how many runs it is the mean of.
        committed, found: the means.
        spread: the committed standard deviation over seeds; None of one seed, which states none.
    """

    row: str
    number: str
    seeds: int
    committed: float
    found: float
    spread: float | None

    @property
    def agrees(self) -> bool:
        """Within the spread, or where none is stated the same but for rounding."""
        room = ROUNDING * max(abs(self.committed), 1.0)
        return math.isclose(self.found, self.committed, abs_tol=max(room, self.spread or 0.0))


def reproduce(
    folder: Path,
    only: Sequence[str],
    out: Path | None,
    as_json: bool,
    backend: str | None,
    workers: int | None,
) -> int:
    """Run all, or the rows that contain one of the texts; 1 if a number is not as committed.

    Raises:
        ConfigError: the folder keeps no runs, or none of these rows.
    """
    kept = _chosen(collect([folder]), only)
    where = overrides((), None, backend, workers)
    cells = [_cell(run, where) for run in kept]
    place = out or Path("results") / "runs" / f"reproduce-{folder.resolve().name}"
    with watched(many=True) as progress:
        ended = run_sweep(cells, place, progress)
    again = collect([place / cell.name for cell in cells if cell.name not in ended.failed])
    found = compared(rows(kept), rows(again))
    if as_json:
        told = [{**asdict(one), "agrees": one.agrees} for one in found]
        click.echo(json.dumps({"compared": told, "failed": ended.failed, "folder": str(place)}))
    else:
        _print(found)
        click.echo(place)
    for name, reason in ended.failed.items():
        click.echo(f"fedlora: {name} failed: {reason}", err=True)
    return int(bool(ended.failed) or not all(one.agrees for one in found))


def cells_of(folder: Path) -> list[Cell]:
    """The runs that a result keeps, as they would be run again."""
    return [_cell(run, ()) for run in collect([folder])]


def compared(committed: Sequence[Row], now: Sequence[Row]) -> list[Compared]:
    """The numbers of rows that are in both."""
    again = {(row.method, row.seeds): row for row in now}
    return [
        Compared(row.method, name, len(row.seeds), before.mean, after.mean, before.deviation)
        for row in committed
        if (same := again.get((row.method, row.seeds)))
        for name in NUMBERS
        if isinstance(before := getattr(row, name), Stat)
        and isinstance(after := getattr(same, name), Stat)
    ]


def _chosen(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs of the rows whose names contain one of the texts; all of them for none."""
    groups = grouped(runs)
    chosen = [run for name, members in groups.items() for run in members if _meant(name, only)]
    if not chosen:
        raise unknown("--only", ",".join(only), groups)
    return chosen


def _meant(name: str, only: Sequence[str]) -> bool:
    return not only or any(text in name for text in only)


def _cell(run: Run, changes: Sequence[str]) -> Cell:
    """A run of the same configuration, but for where it runs."""
    table = {**run.config}
    try:
        config = Recipe(str(table.pop("name", "run")), "", table).resolve(None, changes)
    except ConfigError as error:
        return Cell(run.folder.name, None, str(error))
    return Cell(named(f"{config.method}-seed{config.seed}", config), config)


def _print(found: Sequence[Compared]) -> None:
    """A line for each number."""
    table = Table("row", "number", "seeds", "committed", "found", "")
    for one in found:
        spread = "" if one.spread is None else f" ± {one.spread:.2g}"
        table.add_row(
            one.row,
            "accuracy" if one.number == "mean" else one.number,
            str(one.seeds),
            f"{one.committed:.4f}{spread}",
            f"{one.found:.4f}",
            "agrees" if one.agrees else "DIFFERS",
        )
    Console().print(table, markup=False, highlight=False)
