"""``fedlora sweep``: run the cells of a sweep on as few pools of workers as they need."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.disk import writing
from fedlora.errors import FedloraError, wrong
from simulations.launch import open_grid, serve_on
from simulations.progress import Progress
from simulations.resuming import State, state_of
from simulations.sweep import Cell, Sweep

FAILED = "failed"  # a folder of texts that say why


@dataclass
class Ended:
    """How the cells of a sweep ended that this process was to run.

    Attributes:
        finished: those that were run.
        skipped: those that were finished already.
        failed: why the others could not be, by name.
    """

    finished: list[str]
    skipped: list[str]
    failed: dict[str, str]


def run_sweep(cells: Sequence[Cell], out: Path, progress: Progress) -> Ended:
    """Run what is not finished; a cell that fails is named, and the others go on.

    Raises:
        ConfigError: a folder holds something else.
    """
    states = {cell.name: _state(cell, out) for cell in cells}
    ended = Ended([], [name for name, state in states.items() if state == "finished"], {})
    for cell in cells:
        if cell.refused:
            _fail(ended, cell.name, cell.refused, out, progress)
    left = [cell for cell in cells if not cell.refused and states[cell.name] != "finished"]
    left.sort(key=lambda cell: _pool(_config(cell)))  # stable: cells of one pool in their order
    clock = _Clock(left, len(cells), progress)
    for _, together in itertools.groupby(left, key=lambda cell: _pool(_config(cell))):
        group = list(together)
        try:
            with open_grid(_config(group[0]), progress) as grid:
                for cell in group:
                    clock.begins(cell)
                    resume = states[cell.name] == "begun"
                    try:
                        serve_on(grid, _config(cell), out / cell.name, resume)
                    except Exception as error:  # whatever it is, the other cells are not at fault
                        _fail(ended, cell.name, _line(error), out, progress)
                    else:
                        ended.finished.append(cell.name)
                        (out / FAILED / f"{cell.name}.txt").unlink(missing_ok=True)
                    clock.ended(cell)
        except FedloraError as error:  # no pool for these cells
            gone = {*ended.finished, *ended.failed}
            for cell in group:
                if cell.name not in gone:
                    _fail(ended, cell.name, _line(error), out, progress)
                    clock.ended(cell)
    return ended


def shard(text: str, cells: Sequence[Cell]) -> list[Cell]:
    """The K-th of N parts of the cells, which go to parts by turns.

    Raises:
        ConfigError: not ``K/N`` with K from 1 to N.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise wrong("--shard", text, "K/N with K from 1 to N, such as 2/5")
    return list(cells[int(found[1]) - 1 :: int(found[2])])


def default_out(sweep: Sweep) -> Path:
    """``results/runs/NAME``, the same each time, so that what is finished is found."""
    return Path("results") / "runs" / sweep.name


def told(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:  # Any: JSON
    """Each cell, whether it can run, and how far it is."""
    return [
        {
            "cell": cell.name,
            "state": _state(cell, out),
            **({"why": cell.refused} if cell.refused else {}),
        }
        for cell in cells
    ]


class _Clock:
    """Tells how many cells are done, and how long the rest will take."""

    def __init__(self, left: Sequence[Cell], total: int, progress: Progress) -> None:
        """``left``: to be run, of ``total``."""
        self._left, self._total, self._progress = [*left], total, progress
        self._seconds = self._weight = 0.0
        self._tell()

    def begins(self, cell: Cell) -> None:
        """A cell is about to run."""
        self._began = time.monotonic()

    def ended(self, cell: Cell) -> None:
        """It has run, or failed."""
        self._seconds += time.monotonic() - self._began
        self._weight += cell.weight
        self._left.remove(cell)
        self._tell()

    def _tell(self) -> None:
        rest = sum(cell.weight for cell in self._left)
        known = self._seconds / self._weight * rest if self._weight else None
        self._progress.cells_done(self._total - len(self._left), self._total, known)


def _state(cell: Cell, out: Path) -> State:
    """How far a cell is; what is refused has not begun."""
    return "new" if cell.config is None else state_of(out / cell.name, cell.config)


def _config(cell: Cell) -> RunConfig:
    """Of a cell that can run."""
    assert cell.config is not None
    return cell.config


def _pool(config: RunConfig) -> str:
    """What runs must have in common to share a pool of workers."""
    return json.dumps([config.launch.model_dump(mode="json"), config.clients.number])


def _fail(ended: Ended, name: str, reason: str, out: Path, progress: Progress) -> None:
    """Note that a cell could not be run, and why."""
    ended.failed[name] = reason
    progress.run_failed()
    progress.note(f"{name} failed: {reason}")
    with writing(out / FAILED):
        (out / FAILED).mkdir(parents=True, exist_ok=True)
        (out / FAILED / f"{name}.txt").write_text(reason + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    """An error as one line, with its type where it is not one of ours."""
    kind = "" if isinstance(error, FedloraError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
