"""What the tests of resuming share: runs that die where they are told to, and folders compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedlora import faults
from simulations import launch
from simulations.chaos_runs import config
from simulations.progress import Progress

COMMITTED = ("manifest-after-rename", "after-commit")  # where the round need not be done again


class Died(BaseException):
    """Stands for SIGKILL where a test stays in its process."""


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(folder: Path, *changes: str, resume: bool = False) -> list[str]:
    """Run or go on; returns what was said beside the rounds."""
    told = Told()
    launch.run(config(*changes), folder, told, resume=resume)
    return told.notes


def die(
    patch: pytest.MonkeyPatch, fault: str, folder: Path, *changes: str, resume: bool = False
) -> list[str]:
    """Run, or go on, until a fault point; returns what was said."""
    told = Told()

    def strike() -> None:
        raise Died(fault)

    with patch.context() as armed:
        armed.setattr(faults, "armed", fault)
        armed.setattr(faults, "strike", strike)
        with pytest.raises(Died, match=fault):
            launch.run(config(*changes), folder, told, resume=resume)
    return told.notes


def die_everywhere(
    patch: pytest.MonkeyPatch, points: Sequence[str], rounds: int, folder: Path, *changes: str
) -> None:
    """One run that dies at every point, in each round in turn, and then comes to its end."""
    changes = (*changes, f"rounds={rounds}")
    number = 1
    for done, point in enumerate(points):
        number = max(number, 1 + done * (rounds - 1) // len(points))
        if point == "finish":
            number = rounds
        said = die(patch, f"{point}@{number}", folder, *changes, resume=done > 0)
        assert all("goes on" in note for note in said)
        number += point in COMMITTED
    run(folder, *changes, resume=True)
