"""Ending every process that a command has started, whoever of them started it.

On Linux, where ``/proc`` tells of processes. Elsewhere nothing is found, and what Ray has started
ends by itself when it misses its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

PROCESSES = Path("/proc")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
TRIES = 20  # looks for processes that were started while others were being ended


def adopt(orphans: bool) -> None:
    """Become the parent of descendants that lose theirs, so that they can be found; or no more."""
    if PROCESSES.is_dir():
        ctypes.CDLL(None).prctl(SUBREAPER, int(orphans), 0, 0, 0)


def end_descendants() -> None:
    """Kill them all; without them, nobody is left who could start more."""
    for _ in range(TRIES):
        found = descendants()
        if not found:
            return
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:  # it has ended meanwhile
                continue
        time.sleep(0.01)


def descendants() -> list[int]:
    """The ids of this process's children that run, and of theirs, and so on."""
    children = defaultdict(list)
    for folder in PROCESSES.glob("[0-9]*"):
        try:
            told = (folder / "stat").read_text(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        state, parent = told.rpartition(")")[2].split()[:2]  # after its name, which may hold ")"
        children[int(parent)].append((int(folder.name), state))
    found, ask = [], [os.getpid()]
    while ask:
        for process, state in children[ask.pop()]:
            ask.append(process)
            if state not in "ZX":  # has ended, and nobody has asked for its exit code
                found.append(process)
    return found
