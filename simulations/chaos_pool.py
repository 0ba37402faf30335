"""Pools of Ray workers for chaos: runs on them, and how one of them is killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord

from fedlora.config import LaunchConfig
from fedlora.rounds import RoundRecord
from simulations.chaos_clients import APP, first_arrays
from simulations.grid import LocalGrid
from strategies import FedAvg

GONE = 30.0  # seconds to wait for a process that was killed to be gone, or replaced

Setting = str | int | float | list[int]


@dataclass(frozen=True)
class Played:
    """What a run left."""

    arrays: ArrayRecord
    records: list[RoundRecord]

    @property
    def results(self) -> int:
        """How many clients' results were merged."""
        return sum(len(record.clients) for record in self.records if record.merged)

    @property
    def hash(self) -> str:
        """Of all but times."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(replace(record, seconds=0.0).as_json()).encode())
        for key, array in self.arrays.items():
            digest.update(key.encode() + array.data)
        return digest.hexdigest()[:16]


def play(
    grid: LocalGrid,
    rounds: int,
    on_round: Callable[[float], None] | None = None,
    timeout: float = 600.0,
    **ask: Setting,
) -> Played:
    """A run of FedAvg with all clients of a grid; ``on_round`` hears how long one took."""
    records: list[RoundRecord] = []

    def heard(record: RoundRecord, _: ArrayRecord) -> None:
        records.append(record)
        if on_round is not None and record.round < rounds:
            on_round(record.seconds)

    rule = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=len(grid.contexts),
        settle=0.0,
    )
    config = ConfigRecord(dict(ask))
    done = rule.start(
        grid, first_arrays(), rounds, timeout=timeout, train_config=config, on_round=heard
    )
    return Played(done.arrays, records[1:])


@contextmanager
def pool(clients: int, workers: int) -> Iterator[LocalGrid]:
    """A pool of Ray workers, all of them started."""
    from simulations.ray_grid import RayGrid  # Ray takes seconds to import

    logging.getLogger("flwr").setLevel(logging.WARNING)
    grid = RayGrid(APP, clients, LaunchConfig(backend="ray", workers=workers))
    try:
        grid.ready()
        yield grid
    finally:
        grid.close()


class Killer:
    """Kills a random worker once a round, at a random moment of it."""

    def __init__(self) -> None:
        """Kill nobody yet."""
        self.kills = 0
        self._draw = random.Random(0)
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Killer:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Make an end."""
        self.stop()

    def next(self, seconds: float) -> None:
        """A round is over, and took so long: another one begins."""
        self.stop()
        self.after(self._draw.uniform(0.0, 0.8 * seconds))

    def stop(self) -> None:
        """Wait for the kill that is due."""
        if self._timer is not None:
            self._timer.join()
        self._timer = None

    def after(self, seconds: float) -> None:
        """Kill one in so many seconds."""
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.start()

    def _kill(self) -> None:
        """Kill -9, of one that is there."""
        found = sorted(processes())
        while found and not self._killed(self._draw.choice(found)):
            found = sorted(processes())

    def _killed(self, process: int) -> bool:
        """Whether it was there to be killed."""
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.kills += 1
        return True


def processes() -> set[int]:
    """The processes of the workers that belong to this one, by their ids."""
    columns = ["ps", "-A", "-o", "pid=,ppid=,stat=,args="]
    table = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in table.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows}
    workers = {
        int(row[0])
        for row in rows
        if len(row) == 4 and row[3].startswith("ray::Worker") and not row[2].startswith("Z")
    }
    return {worker for worker in workers if _below(worker, os.getpid(), parents)}


def _below(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    """Whether one process descends from another."""
    while process in parents and process != ancestor:
        process = parents[process]
    return process == ancestor


def all_there(workers: int) -> bool:
    """Whether there are so many processes of workers again, waited for."""
    end = time.monotonic() + GONE
    while len(processes()) != workers:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
