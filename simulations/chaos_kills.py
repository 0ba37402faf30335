"""Runs that are killed or stopped, each gone on with and held against one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora import faults
from simulations.chaos_faults import Fault, Size
from simulations.chaos_runs import (
    PATIENCE,
    argv,
    ended,
    forked,
    prepared,
    run,
    tree,
    wholes,
)
from simulations.cli import main

STOPPED = 5.0  # seconds that an end may take


def kills(size: Size) -> list[Fault]:
    """SIGKILL at each fault point in each round; those of the ledger in private runs."""
    found = []
    with prepared() as folder:
        for whole in wholes(folder, size.points or tuple(faults.POINTS), size.kill_rounds):
            for point in whole.points:
                rounds = range(1, size.kill_rounds + 1)
                numbers = [size.kill_rounds] if point == "finish" else rounds
                there = same = 0
                for number in numbers:
                    fault = f"{point}@{number}"
                    code = run(folder / fault, whole.changes, fault)
                    reached, again = code == -signal.SIGKILL, whole.again(folder / fault)
                    there, same = there + reached, same + (reached and again)
                seen = f"{there} died there, {same} ended as if they had not"
                found.append(Fault(f"killed at {point}", len(numbers), same, seen))
    return found


def signals(size: Size) -> list[Fault]:
    """SIGINT and SIGTERM at random times of the first half of a run, through the command."""
    rounds, drawn = 20, random.Random(0)  # so many that it does not end before it is stopped
    ends: dict[str, list[_End]] = {"SIGINT": [], "SIGTERM": []}
    with prepared() as folder:
        changes = (f"rounds={rounds}",)
        run(folder / "all", changes)
        whole = tree(folder / "all")
        for number in range(size.signals):
            asked = (signal.SIGINT, signal.SIGTERM)[number % 2]
            out = folder / f"stop{number}"
            child = forked(lambda out=out: main(argv(changes, out)))  # type: ignore[misc]
            _wait(out, drawn.randint(0, rounds // 2))
            time.sleep(drawn.uniform(0, 0.05))
            os.kill(child, asked)
            sent = time.monotonic()
            code, seconds = ended(child), time.monotonic() - sent
            again = ended(forked(lambda out=out: main(["run", "--resume", str(out)])))  # type: ignore[misc]
            same = again == 0 and tree(out) == whole
            ends[asked.name].append(_End(code, seconds, same))
    return [_told(name, 128 + signal.Signals[name], found) for name, found in ends.items()]


@dataclass(frozen=True)
class _End:
    """How a run ended that was asked to: its code, seconds, whether it went on the same."""

    code: int
    seconds: float
    same: bool


def _told(name: str, code: int, ends: Sequence[_End]) -> Fault:
    """The line of one signal, which must have ended the runs with this code."""
    survived = sum(end.code == code and end.seconds <= STOPPED and end.same for end in ends)
    codes = sorted({end.code for end in ends})
    slowest = max((end.seconds for end in ends), default=0.0)
    seen = (
        f"ended with {', '.join(map(str, codes))} after {slowest:.1f} s at most, "
        f"{sum(end.same for end in ends)} went on the same"
    )
    return Fault(f"{name} at any time", len(ends), survived, seen)


def _wait(folder: Path, records: int) -> None:
    """Until a run has begun and written so many records."""
    deadline, lines = time.monotonic() + PATIENCE, folder / "rounds.jsonl"
    while time.monotonic() < deadline:
        found = lines.read_bytes().count(b"\n") if lines.exists() else 0
        if found >= records and (folder / "config.toml").exists():
            return
        time.sleep(0.002)
