"""Simulated clients in virtual time: fast or slow, there or away, lost on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fedlora.config_clock import ClockConfig
from fedlora.errors import FedloraError
from fedlora.seeds import numpy_generator

Fate = Literal["replies", "late", "dropped out", "went away"]
FATES: tuple[Fate, ...] = ("replies", "late", "dropped out", "went away")


@dataclass(frozen=True)
class Task:
    """What a client was asked for, and what becomes of it.

    Attributes:
        client: its node.
        began, ends: when, in virtual seconds.
        fate: ``replies``, or what it is lost by.
        number: how many tasks began before it.
        version: how many merges led to the adapter that it began from.
    """

    client: int
    began: float
    ends: float
    fate: Fate
    number: int = 0
    version: int = 0

    @property
    def order(self) -> tuple[float, int]:
        """By time, then by client."""
        return self.ends, self.client


@dataclass(frozen=True)
class World:
    """The clients of a run, as the virtual clock knows them. Nothing here depends on real time.

    Attributes:
        clock: see ``ClockConfig``.
        seed: of speeds, windows and losses.
        work: by node, the examples that its local steps of a round take together.
    """

    clock: ClockConfig
    seed: int
    work: Mapping[int, float]

    def factor(self, client: int) -> float:
        """By how much a client's seconds are multiplied."""
        if self.clock.speeds == "uniform":
            return 1.0 + self.clock.spread * _even(self.seed, "speed", client)
        if self.clock.speeds == "lognormal":
            return math.exp(self.clock.spread * _normal(self.seed, "speed", client))
        return 1.0

    def seconds(self, client: int, bytes_down: float, bytes_up: float) -> float:
        """What a task takes a client that nothing stops.

        Raises:
            FedloraError: nobody has said how much this client works.
        """
        if client not in self.work:
            raise FedloraError(f"world: found no work of node {client}, needed: of every node")
        clock = self.clock
        down, up = clock.seconds_per_megabyte_down, clock.seconds_per_megabyte_up
        sending = (bytes_down * down + bytes_up * up) / 1e6
        return self.factor(client) * (self.work[client] * clock.seconds_per_example + sending)

    def window(self, client: int, time: float) -> tuple[float, float]:
        """The first of a client's windows to end after ``time``: when it comes and goes."""
        if self.clock.availability == 1.0:
            return -math.inf, math.inf
        day = self.clock.day
        offset, length = day * _even(self.seed, "window", client), day * self.clock.availability
        number = math.floor((time - offset) / day) - 1
        while offset + number * day + length <= time:
            number += 1
        return offset + number * day, offset + number * day + length

    def there(self, clients: Iterable[int], time: float) -> list[int]:
        """Those of the clients that are there."""
        return [client for client in clients if self.window(client, time)[0] <= time]

    def gathered(self, clients: Sequence[int], time: float, least: int) -> tuple[float, list[int]]:
        """The first moment from ``time`` on when ``least`` clients are there, and who is.

        Raises:
            FedloraError: there is none.
        """
        moments = {time, *(max(time, self.window(client, time)[0]) for client in clients)}
        for moment in sorted(moments):
            found = self.there(clients, moment)
            if len(found) >= least:
                return moment, found
        raise FedloraError(
            f"clock.availability: found {self.clock.availability:g}, at which never {least} of "
            f"{len(clients)} clients are there at once; allowed: more, or fewer min_train_nodes"
        )

    def task(
        self, client: int, began: float, bytes_down: float, bytes_up: float, *names: int
    ) -> Task:
        """A client's task; ``names`` tell it from all others of the run."""
        rng = numpy_generator(self.seed, "lost", *names)
        lost, share = rng.random() < self.clock.dropout, rng.random()
        seconds = self.seconds(client, bytes_down, bytes_up)
        ends: list[tuple[float, Fate]] = [(began + seconds, "replies")]
        if lost:
            ends.append((began + share * seconds, "dropped out"))
        ends.append((self.window(client, began)[1], "went away"))
        if self.clock.deadline:
            ends.append((began + self.clock.deadline, "late"))
        first, fate = min(ends, key=lambda end: end[0])  # of several at once, the first in the list
        return Task(client, began, first, fate)


@lru_cache(maxsize=2**16)
def _even(seed: int, name: str, client: int) -> float:
    """A client's number, even in [0, 1)."""
    return float(numpy_generator(seed, name, client).random())


@lru_cache(maxsize=2**16)
def _normal(seed: int, name: str, client: int) -> float:
    """A client's standard normal number."""
    return float(numpy_generator(seed, name, client).standard_normal())
