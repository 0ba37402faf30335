"""Half an hour of rounds with a fault every few seconds: does anything hang, or grow?"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
import numpy

from fedlora.rounds import RoundRecord
from simulations.chaos_faults import Fault, Size
from simulations.chaos_pool import Killer, Setting, play, pool
from simulations.chaos_workers import DEADLINE, GRACE, WORK
from simulations.grid import LocalGrid
from simulations.memory import resident_bytes

SEEN = {
    "kill": "everybody counted",
    "none": "everybody counted",
    "sleeps": f"named, and the round over within {DEADLINE + GRACE:g} s",
}
EVERY = 5.0  # seconds from one fault to the next
HANGS = 60.0  # seconds after which a round counts as hanging, and the command ends
SLOPE = 1.0  # MB of memory a minute
SETTLED = 0.2  # the share of the time after which memory is looked at
SHORT = 5.0  # minutes below which its slope says nothing
KINDS = {
    "kill": "a worker killed in mid-round",
    "dies": "a client that kills its worker each time",
    "sleeps": f"a client that never ends, deadline {DEADLINE:g} s",
    "spoils": "an upload that holds no numbers",
    "none": "rounds without a fault",
}


@dataclass
class Log:
    """What was seen so far.

    Attributes:
        injected, survived: faults by their kind.
        times, memory: after each round, seconds since the start and bytes that this process holds.
        slowest: seconds of a round.
    """

    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    slowest: float = 0.0

    def slope(self) -> float:
        """MB of memory a minute, by least squares, once the process has settled."""
        late = [n for n, at in enumerate(self.times) if at >= SETTLED * self.times[-1]]
        if len(late) < 3:
            return 0.0
        minutes = numpy.array(self.times)[late] / 60
        return float(numpy.polyfit(minutes, numpy.array(self.memory)[late] / 2**20, 1)[0])


def soak(size: Size) -> list[Fault]:
    """Rounds without an end but the clock's; whoever is not at fault must count in each of them."""
    log, drawn, began = Log(), random.Random(0), time.monotonic()
    end, due = began + 60 * size.soak, began + EVERY
    with pool(size.clients, size.workers) as grid, _watched() as alive:
        while (now := time.monotonic()) < end:
            kind = "none"
            if now >= due:
                kind, due = drawn.choice([*KINDS][:-1]), now + EVERY
            culprit = drawn.randrange(size.clients)
            record = _round(grid, kind, culprit, drawn.uniform(0.0, 0.2))
            alive()
            log.slowest = max(log.slowest, record.seconds)
            log.injected[kind] += 1
            log.survived[kind] += _stood(record, kind, culprit, size.clients)
            gc.collect()
            log.times.append(time.monotonic() - began)
            log.memory.append(resident_bytes("VmRSS"))
    return _told(log, size)


def _round(grid: LocalGrid, kind: str, culprit: int, moment: float) -> RoundRecord:
    """One round with a fault of this kind."""
    ask: dict[str, Setting] = {kind: [culprit]} if kind in ("dies", "sleeps", "spoils") else {}
    timeout = DEADLINE if kind == "sleeps" else 2 * HANGS
    with Killer() as killer:
        if kind == "kill":
            killer.after(moment)
        (record,) = play(grid, 1, None, timeout, run="soak", seconds=WORK, **ask).records
    return record


def _stood(record: RoundRecord, kind: str, culprit: int, clients: int) -> bool:
    """Whether the round was merged from all that were not at fault, who are named."""
    named = {failure.client: failure.reason for failure in record.failures}
    if kind in ("kill", "none"):
        return record.merged and len(record.clients) == clients
    if kind == "sleeps":  # others may wait behind it
        in_time = record.seconds <= DEADLINE + GRACE
        return record.merged and in_time and "no reply" in named.get(culprit, "")
    return record.merged and [*named] == [culprit] and len(record.clients) == clients - 1


def _told(log: Log, size: Size) -> list[Fault]:
    """A line for each kind, and one for what all of it came to."""
    lines = [
        Fault(
            f"soak: {told}",
            log.injected[kind],
            log.survived[kind],
            SEEN.get(kind, "named; everybody else counted"),
        )
        for kind, told in KINDS.items()
        if log.injected[kind]
    ]
    slope = log.slope()
    seen = (
        f"{len(log.times)} rounds, the slowest took {log.slowest:.1f} s; memory "
        f"{slope:+.2f} MB a minute, {log.memory[-1] / 2**20:.0f} MB at the end"
    )
    fine = slope < SLOPE or size.soak < SHORT
    return [*lines, Fault(f"{size.soak:g} minutes without a pause", 1, int(fine), seen)]


@contextmanager
def _watched() -> Iterator[Callable[[], None]]:
    """End the process, with a line, where nobody calls for ``HANGS`` seconds."""

    def hangs() -> None:
        click.echo(f"fedlora: chaos: a round hangs for more than {HANGS:g} s", err=True)
        os._exit(1)

    timers: list[threading.Timer] = []

    def alive() -> None:
        for timer in timers:
            timer.cancel()
        timers[:] = [threading.Timer(HANGS, hangs)]
        timers[0].daemon = True
        timers[0].start()

    alive()
    try:
        yield alive
    finally:
        timers[0].cancel()
