"""Disks that are full, or may only be read, from some point of a run on.

A child sees a disk of its own in the run's folder (Linux mounts it for that process alone), so the
errors are the system's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click

from fedlora import faults
from simulations.chaos_faults import Fault, Size
from simulations.chaos_runs import argv, ended, forked, prepared, wholes
from simulations.cli import MISTAKE, main

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
READ_ONLY, REMOUNT, RECURSIVE, PRIVATE = 1, 32, 1 << 14, 1 << 18
FILLER = "filler"
BUSY = 75


def disk(size: Size) -> list[Fault]:
    """Let the disk be full, and then read-only, at each fault point.

    Where the system gives a process no mounts of its own, that is said and there is no line.
    """
    with prepared() as folder:
        place = folder / "probe"
        place.mkdir()
        if ended(forked(lambda: own_disk(place))):
            click.echo("disk: not tried; this system lets no process mount its own", err=True)
            return []
        found = {"full": _Tally(), "read-only": _Tally()}
        for whole in wholes(folder, size.points or tuple(faults.POINTS), size.disk_rounds):
            for point in whole.points:
                fault = f"{point}@{size.disk_rounds}"
                for kind, close in (("full", fill), ("read-only", lock)):
                    out, left = folder / f"{kind}-{fault}", folder / f"{kind}-{fault}-left"
                    said = _run_out(out, left, fault, close, argv(whole.changes, out))
                    if said is None:  # a file is open there, so nothing can make it read-only
                        continue
                    found[kind].add(fault, _one_line(said, out), whole.again(left))
    return [
        Fault(f"the disk is {kind} from a point on", tally.tried, tally.held, tally.seen())
        for kind, tally in found.items()
    ]


class _Tally:
    """What became of the runs of one kind."""

    def __init__(self) -> None:
        self.tried = self.held = 0
        self._wrong: list[str] = []

    def add(self, fault: str, line: str, same: bool) -> None:
        """``line``: what was wrong with what it said, or nothing."""
        wrong = line or ("" if same else "does not go on the same")
        self.tried += 1
        self.held += not wrong
        self._wrong += [f"{fault}: {wrong}"] if wrong else []

    def seen(self) -> str:
        """In words."""
        good = "one line each with path and bytes, exit code 2; with room again all ended the same"
        return "; ".join(self._wrong[:3]) or good


def _run_out(
    out: Path, left: Path, fault: str, close: Callable[[Path], None], command: list[str]
) -> tuple[int, str] | None:
    """Run until the disk gives out; returns the exit code and what was said.

    What the folder held is copied to ``left``. None if the disk could not be made to give out.
    """
    out.mkdir()
    told = out.with_name(f"{out.name}.txt")

    def work() -> int:
        own_disk(out)
        refused = []

        def strike() -> None:
            try:
                close(out)
            except BlockingIOError:
                refused.append(fault)
                faults.armed = ""

        faults.armed = fault
        faults.strike = strike
        code = main(command)
        shutil.copytree(out, left, ignore=shutil.ignore_patterns(FILLER))
        return BUSY if refused else code

    code = ended(forked(work, told))
    return None if code == BUSY else (code, told.read_text())


def _one_line(said: tuple[int, str], folder: Path) -> str:
    """What is wrong with how a run ended; empty if nothing."""
    code, text = said
    lines = [line for line in text.splitlines() if line.startswith("fedlora: ")]
    if code != MISTAKE or "Traceback" in text or len(lines) != 1:
        return f"ended with {code} and {len(lines)} lines: {' '.join(text.split())[-200:]}"
    named = str(folder) in lines[0] and "bytes" in lines[0]
    return "" if named else f"said {lines[0]!r}"


def own_disk(folder: Path) -> None:
    """Give this process a disk in a folder, which no other process sees.

    Raises:
        OSError: the system does not allow it.
    """
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if system.unshare(NEW_MOUNTS) != 0:
        _check(system.unshare(NEW_MOUNTS | NEW_USER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(system.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
    _check(system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=16m,mode=1777"))


def fill(folder: Path) -> None:
    """Leave no room on the disk of a folder."""
    with (folder / FILLER).open("wb", buffering=0) as file:
        for piece in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                continue


def lock(folder: Path) -> None:
    """Let the disk of a folder only be read.

    Raises:
        BlockingIOError: a file on it is open for writing.
    """
    system = ctypes.CDLL(None, use_errno=True)
    if system.mount(None, os.fsencode(folder), None, REMOUNT | READ_ONLY, None) != 0:
        raise BlockingIOError(ctypes.get_errno(), str(folder))


def _check(code: int) -> None:
    """Raise what the system says."""
    if code != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
