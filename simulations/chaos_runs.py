"""Runs that chaos ends: each is a child of this process, and its folder is what is left of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedlora import faults
from fedlora.config import RunConfig
from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load
from simulations.results import TRACK
from simulations.stopping import SIGNALS

QUICK = ("task.rows_per_group=10", "train.steps=2")
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
LEDGER = tuple(point for point in faults.POINTS if point.startswith("ledger"))
PATIENCE = 60.0  # seconds until a run counts as hanging
HUNG = 1000


def config(*changes: str) -> RunConfig:
    """A short run of ``tiny``."""
    return load("tiny").resolve(None, [*QUICK, *changes])


def argv(changes: tuple[str, ...], folder: Path) -> list[str]:
    """The command of the same run."""
    sets = [word for change in (*QUICK, *changes) for word in ("--set", change)]
    return ["run", "tiny", *sets, "--out", str(folder)]


def tree(folder: Path) -> dict[str, str]:
    """The sha256 of every file of finished runs; times, and what trackers were told, aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, data = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""
        if path.name == "environment.json":  # when, and by which command
            continue
        if TRACK in path.relative_to(folder).parts:
            continue
        if path.name == "rounds.jsonl":
            records = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{**record, "seconds": 0} for record in records]).encode()
        if path.name == "summary.json":
            data = json.dumps({**json.loads(data), "seconds": 0}).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@contextmanager
def prepared() -> Iterator[Path]:
    """A folder for runs, once what all of them need is loaded: children find it in their memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no other threads
    try:
        with TemporaryDirectory() as folder:
            launch.run(config("rounds=1"), Path(folder) / "first", Progress())
            yield Path(folder)
    finally:
        torch.set_num_threads(threads)


def forked(work: Callable[[], int | None], said: Path | None = None) -> int:
    """The process id of a child that does the work and ends with what it returns.

    ``said``: a file for what it prints, instead of none.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sys.stderr = sys.stdout = (said or Path(os.devnull)).open("w")
        for number, usual in SIGNALS.items():  # whoever forks may ignore them, or listen itself
            signal.signal(number, usual)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """A child's exit code, or minus the signal that ended it; ``HUNG`` if it had to be killed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def run(folder: Path, changes: tuple[str, ...], fault: str = "", resume: bool = False) -> int:
    """A run in a child, as ``ended`` tells of it."""

    def work() -> None:
        faults.armed = fault
        launch.run(config(*changes), folder, Progress(), resume=resume)

    return ended(forked(work))


def wholes(folder: Path, points: tuple[str, ...], rounds: int) -> Iterator[Whole]:
    """Runs that go through, and which of the fault points each is to be held against."""
    for private in (False, True):
        chosen = tuple(point for point in points if (point in LEDGER) == private)
        changes = (f"rounds={rounds}", *(PRIVATE if private else ()))
        if chosen:
            yield Whole(folder / f"whole{private}", changes, chosen)


class Whole:
    """One run that goes through.

    Attributes:
        changes: to the recipe.
        points: fault points that such a run reaches.
        left: what it leaves; see ``tree``.
    """

    def __init__(self, folder: Path, changes: tuple[str, ...], points: tuple[str, ...]) -> None:
        """Run it.

        Raises:
            RuntimeError: it does not go through.
        """
        self.changes, self.points = changes, points
        if (code := run(folder, changes)) != 0:
            raise RuntimeError(f"an undisturbed run ended with {code}")
        self.left = tree(folder)

    def again(self, folder: Path) -> bool:
        """Go on with another run; whether it then ends the same."""
        return run(folder, self.changes, resume=True) == 0 and tree(folder) == self.left
