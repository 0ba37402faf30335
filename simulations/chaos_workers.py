"""Faults of workers: killed ones, slow ones, and ones that never end."""

from __future__ import annotations

import os
import random
import tempfile
from itertools import product

from simulations.chaos_clients import FIRST_TRIES, app
from simulations.chaos_faults import Fault, Size
from simulations.chaos_pool import Killer, all_there, play, pool, processes
from simulations.grid import InProcessGrid

DEADLINE, GRACE = 2.0, 1.0  # seconds; a round ends at most so long after its deadline
WORK = 0.02  # seconds of a client


def killed_workers(size: Size) -> list[Fault]:
    """One worker killed each round, at any moment; then a client that kills its own each time."""
    with pool(size.clients, size.workers) as grid, Killer() as killer:
        done = play(grid, size.rounds, killer.next, run="killed", seconds=WORK)
        killer.stop()
        play(grid, 1, run="next")  # in which somebody notices who is dead
        there = all_there(size.workers)
        lost = sum(not record.merged for record in done.records)
        wanted = size.rounds * size.clients
        deadly = play(grid, 1, run="deadly", dies=[size.clients // 2]).records[0]
        after = play(grid, 1, run="after").results
    named = {failure.client: failure.reason for failure in deadly.failures}
    given_up = list(named) == [size.clients // 2] and "died 3 times" in str(named)
    return [
        Fault(
            "a worker killed in each round",
            killer.kills,
            killer.kills if done.results == wanted and not lost and there else 0,
            f"{done.results} of {wanted} results, {lost} rounds lost, "
            f"{'all' if there else 'not all'} {size.workers} workers there afterwards",
        ),
        Fault(
            "a client that kills its worker each time",
            1,
            int(given_up and len(deadly.clients) == after - 1 == size.clients - 1),
            f"given up: {named}; {len(deadly.clients)} of {size.clients} results, "
            f"{after} in the next round",
        ),
    ]


def order(size: Size) -> list[Fault]:
    """Numbers of workers, delays and first tries that fail, in all combinations: one result."""
    hashes: dict[str, str] = {}
    plain = play(InProcessGrid(app, size.clients), size.order_rounds, run="in process")
    for workers in size.pools:
        with pool(size.clients, workers) as grid, tempfile.TemporaryDirectory() as folder:
            for jitter, fails in product((0.0, 0.05), (False, True)):
                name = f"{workers} workers, jitter {jitter:g}, failures {fails}"
                marks = os.path.join(folder, str(jitter))
                if fails:
                    os.mkdir(marks)
                done = play(
                    grid, size.order_rounds, run=name, jitter=jitter, fails=marks if fails else 0
                )
                hashes[name] = done.hash
    same = sum(found == plain.hash for found in hashes.values())
    return [
        Fault(
            f"other workers, delays up to 50 ms, {FIRST_TRIES:.0%} of first tries killed",
            len(hashes),
            same,
            f"{len({plain.hash, *hashes.values()})} result from {len(hashes)} combinations "
            "and from one process",
        )
    ]


def stragglers(size: Size) -> list[Fault]:
    """A tenth of the clients never end: the round ends at its deadline, and they are named."""
    asleep = sorted(random.Random(0).sample(range(size.clients), max(1, size.clients // 10)))
    workers = len(asleep) + 2
    with pool(size.clients, workers) as grid:
        play(grid, 1, run="warm")
        before = processes()
        late = play(grid, 1, timeout=DEADLINE, run="late", seconds=WORK, sleeps=asleep)
        (record,) = late.records
        there = all_there(workers)
        left = before & processes()
        after = play(grid, 1, run="after").results
    named = [failure.client for failure in record.failures]
    beside = sorted(set(named) - set(asleep))  # type: ignore[type-var]
    in_time = record.seconds <= DEADLINE + GRACE
    told = set(asleep) <= set(named) and all("no reply" in f.reason for f in record.failures)
    gone = len(left) <= workers - len(asleep) and there
    return [
        Fault(
            f"clients that never end, deadline {DEADLINE:g} s",
            len(asleep),
            len(asleep) * int(in_time and told and gone and after == size.clients),
            f"the round took {record.seconds:.2f} s, clients {asleep} named, {len(beside)} others "
            f"lost behind them, {'nothing' if gone else 'something'} left running, {after} of "
            f"{size.clients} results in the next round",
        )
    ]
