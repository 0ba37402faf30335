"""What ``fedlora sweep`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from simulations.commands import overrides, show, watched
from simulations.run_folders import collect
from simulations.sweep import read_sweep
from simulations.sweeping import default_out, run_sweep, shard, told
from simulations.tables import write


def sweep(
    file: Path,
    part: str | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    **launching: Any,  # Any: see overrides
) -> int:
    """Run a sweep, or a part of it; 1 if a cell failed."""
    plan = read_sweep(file)
    cells = plan.cells(overrides(**launching))
    mine = shard(part, cells) if part else cells
    folder = out or default_out(plan)
    if dry_run:
        _list(told(mine, folder), as_json)
        return 0
    with watched(many=True) as progress:
        ended = run_sweep(mine, folder, progress)
    places = [folder / cell.name for cell in cells]
    finished = [place for place in places if (place / "summary.json").is_file()]
    runs = collect(finished) if finished else []
    written = [str(path) for path in write(runs, folder)] if runs else []
    for name, reason in ended.failed.items():
        click.echo(f"fedlora: {name} failed: {reason}", err=True)
    where = {
        "folder": str(folder),
        "written": written,
        "cells": {"all": len(cells), "run": ended.finished, "skipped": ended.skipped},
        "failed": ended.failed,
    }
    show(runs, where, as_json)
    return int(bool(ended.failed))


def _list(cells: list[dict[str, Any]], as_json: bool) -> None:
    """Print what a sweep would run."""
    if as_json:
        return click.echo(json.dumps({"cells": cells}, indent=2))
    table = Table("cell", "state")
    for cell in cells:
        name, *state = cell.values()
        table.add_row(name, ": ".join(state))
    Console().print(table, markup=False, highlight=False)
