"""Rows that are the clients' own: each one's are read when it is asked for, and nobody else's."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy
from numpy.typing import NDArray

from fedlora.config import ClientConfig
from fedlora.errors import ConfigError, DataError
from fedlora.partition import by_own_groups, check_split, hold_back, hold_back_of, partition
from fedlora.tasks import load_own
from fedlora.tasks.task import AtClients, Examples, Task

KEPT = 256  # clients whose rows stay in memory
Parts = tuple[NDArray[numpy.int64], NDArray[numpy.int64]]


@dataclass(frozen=True)
class Place:
    """Where a node says that its client's rows are; empty is where the recipe says."""

    data: str = ""
    held_out: str = ""


class OwnRows:
    """Each client's task, of its own rows alone."""

    def __init__(self, config: ClientConfig, where: AtClients) -> None:
        self._config, self._where = config, where
        self._places: dict[int, Place] = {}
        self._tasks: OrderedDict[int, tuple[object, Task]] = OrderedDict()

    def found_at(self, client: int, place: Place) -> None:
        """Read a client's rows from there from now on."""
        self._places[client] = place

    def task(self, client: int) -> Task:
        """A client's rows, as a task by itself.

        Raises:
            ConfigError: they cannot be read; why is logged here, and told to nobody else.
        """
        try:
            return self.read(client)
        except DataError as error:
            logging.getLogger("fedlora").error("%s", error)
            raise ConfigError(error.told(client)) from None

    def read(self, client: int) -> Task:
        """As ``task``, for whoever may know what is wrong with the rows; anew when they change.

        Raises:
            DataError: they cannot be read.
            ConfigError: they are too few, or no place is named for them.
        """
        place = self._places.get(client, Place())
        state = self._where.state_of(client, place.data, place.held_out)
        if client not in self._tasks or self._tasks[client][0] != state:
            self._tasks.pop(client, None)
            task = load_own(self._config.task, client, place.data, place.held_out)
            least = max(self._config.clients.min_examples, 2 * self._config.evaluate.personal)
            if len(task.train) < least:
                raise ConfigError(
                    f"client {client}: found {len(task.train)} row(s) to train on, allowed: at "
                    f"least {least} (clients.min_examples, evaluate.personal)"
                )
            self._tasks[client] = state, task
            if len(self._tasks) > KEPT:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(client)
        return self._tasks[client][1]

    def parts(self, client: int) -> Parts:
        """Of the rows of ``task(client).train``, those that train and those held back."""
        rows = numpy.arange(len(self.task(client).train), dtype=numpy.int64)
        measures = self._config.evaluate
        if not measures.personal:
            return rows, rows[:0]
        return hold_back_of(client, rows, measures.holdout, self._config.seed)


@dataclass(frozen=True)
class OwnParts(Sequence[NDArray[numpy.int64]]):
    """One of ``OwnRows.parts`` for every client: 0 trains, 1 is held back."""

    own: OwnRows
    number: int
    which: int

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, client: int) -> NDArray[numpy.int64]: ...

    @overload
    def __getitem__(self, client: slice) -> Sequence[NDArray[numpy.int64]]: ...

    def __getitem__(
        self, client: int | slice
    ) -> NDArray[numpy.int64] | Sequence[NDArray[numpy.int64]]:
        if isinstance(client, slice):
            return [self[one] for one in range(*client.indices(self.number))]
        if not 0 <= client < self.number:
            raise IndexError(client)
        return self.own.parts(client)[self.which]


def holdings(
    config: ClientConfig, task: Task
) -> tuple[OwnRows | None, Sequence[NDArray[numpy.int64]], Sequence[NDArray[numpy.int64]]]:
    """The clients' own rows, where they have some; what of each client's trains, what is held back.

    Raises:
        ConfigError: the task cannot be dealt as the recipe says.
    """
    clients, measures = config.clients, config.evaluate
    check_split(task, clients)
    if task.at_clients is not None:
        own = OwnRows(config, task.at_clients)
        return own, OwnParts(own, clients.number, 0), OwnParts(own, clients.number, 1)
    dealt = partition(task, clients, config.seed)
    if not measures.personal:
        return None, dealt, ()
    return None, *hold_back(dealt, measures.holdout, config.seed)


def measured_rows(
    config: ClientConfig,
    task: Task,
    held_out: Examples,
    parts: Sequence[NDArray[numpy.int64]],
    client: int,
    share: tuple[int, int],
) -> NDArray[numpy.int64]:
    """Which of the held-out rows a client measures; see ``EvaluateConfig``.

    All where they are the client's own; else the one of so many equal ``share``s, or its share of
    the rows of its groups. ``parts`` are all clients' training rows.
    """
    if config.clients.split == "own":
        return numpy.arange(len(held_out))
    if config.evaluate.rows == "share":
        return numpy.arange(share[0], len(held_out), share[1])
    able = parts[: config.clients.training]
    return by_own_groups(client, held_out.groups, task.train.groups, able)
