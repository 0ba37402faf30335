"""Dealing a task's training examples to clients, and a count of what each one got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy

from fedlora import seeds
from fedlora.config import ClientsConfig, TaskConfig
from fedlora.errors import ConfigError, wrong
from fedlora.partitioners import Rows, by_library, by_source, within_groups
from fedlora.proportions import by_proportions
from fedlora.tasks import load_own, load_task
from fedlora.tasks.task import Examples, Task


@dataclass(frozen=True)
class SkewRow:
    """What one client holds.

    Attributes:
        client: its number, from 0.
        examples: how many it has.
        labels: count of each label by name, in the task's order, zeros included; empty for
            language modelling.
        groups: count of each group by name, likewise.
    """

    client: int
    examples: int
    labels: dict[str, int]
    groups: dict[str, int]


def deal(config: TaskConfig, clients: ClientsConfig, seed: int) -> tuple[Task, tuple[Rows, ...]]:
    """A task and what each client holds of ``task.train``; see ``partition``.

    Where clients have rows of their own, those of all are read, and their parts are put together.

    Raises:
        ConfigError: the task cannot be dealt so, or rows cannot be read.
    """
    task = load_task(config)
    if task.at_clients is None:
        return task, partition(task, clients, seed)
    check_split(task, clients)
    tasks = [load_own(config, client) for client in range(clients.number)]
    names = tuple(sorted({name for own in tasks for name in own.group_names}))
    train, validation, test = (
        _together([(getattr(own, part), own.group_names) for own in tasks], names)
        for part in ("train", "validation", "test")
    )
    ends = numpy.cumsum([0, *(len(own.train) for own in tasks)])
    parts = tuple(numpy.arange(*pair, dtype=numpy.int64) for pair in pairwise(ends))
    _check_sizes(parts, clients)
    whole = Task(task.name, task.objective, task.label_names, names, train, validation, test)
    return whole, parts


def check_split(task: Task, clients: ClientsConfig) -> None:
    """Refuse to deal rows that clients have of their own, and the other way round.

    Raises:
        ConfigError: ``clients.split`` is ``own`` for another task, or is not for such a one.
    """
    if task.at_clients is not None and clients.split != "own":
        allowed = f"'own' with task {task.name!r}, whose clients have rows of their own"
        raise wrong("clients.split", clients.split, allowed)
    if task.at_clients is None and clients.split == "own":
        allowed = f"a way to deal the rows of task {task.name!r}; 'own' goes with task 'local'"
        raise wrong("clients.split", clients.split, allowed)


def partition(task: Task, clients: ClientsConfig, seed: int) -> tuple[Rows, ...]:
    """The rows of ``task.train`` that each client holds, sorted; no row is held twice.

    ``group`` gives client k the k-th group. ``natural`` gives one source each, in the order of
    their names; if there are more sources with ``min_examples`` examples than clients, a
    seeded draw leaves some out. ``iid`` and ``dirichlet`` deal every row. ``pathological``
    gives client k the class k modulo the number of classes and ``classes - 1`` others at
    random; a class that nobody drew is not dealt. ``group_dirichlet`` gives client k rows of group
    k modulo the number of groups, and deals each group's rows to its clients as ``dirichlet`` does.
    ``proportions`` gives each client the same number of rows with the label shares written for it:
    the most for which every class suffices.

    Raises:
        ConfigError: the task cannot be dealt so, or a client would have too few examples.
    """
    check_split(task, clients)
    if clients.split == "group":
        parts = _by_group(task, clients)
    elif clients.split == "natural":
        parts = by_source(task, clients, seed)
    elif clients.split == "group_dirichlet":
        parts = within_groups(task, clients, seed)
    elif clients.split == "proportions":
        generator = seeds.numpy_generator(seed, "partition")
        parts = by_proportions(task.train.labels, task.label_names, clients, generator)
    else:
        parts = by_library(task, clients, seed)
    _check_sizes(parts, clients)
    return parts


def _check_sizes(parts: tuple[Rows, ...], clients: ClientsConfig) -> None:
    """Refuse a client with too few examples."""
    poor = [k for k, rows in enumerate(parts) if len(rows) < clients.min_examples]
    if poor:
        raise ConfigError(
            f"clients.min_examples: client(s) {_listed(poor)} would have fewer than "
            f"{clients.min_examples} examples; lower clients.min_examples or clients.number, "
            "or use another clients.split"
        )


def hold_back(
    parts: tuple[Rows, ...], share: float, seed: int
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """Each client's rows that train, and those that never do: a seeded ``share`` of them, sorted.

    One row at least is held back, and one at least trains.

    Raises:
        ConfigError: a client has a single row.
    """
    few = [client for client, rows in enumerate(parts) if len(rows) < 2]
    if few:
        raise ConfigError(
            f"evaluate.personal: client(s) {_listed(few)} have a single row, and measuring needs "
            "one beside those that train; raise clients.min_examples to 2"
        )
    found = [hold_back_of(client, rows, share, seed) for client, rows in enumerate(parts)]
    return tuple(own[0] for own in found), tuple(own[1] for own in found)


def hold_back_of(client: int, rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """As ``hold_back``, of one client with two rows or more."""
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    order = seeds.numpy_generator(seed, "client", client, "hold back").permutation(rows)
    return numpy.sort(order[count:]), numpy.sort(order[:count])


def by_own_groups(client: int, held_out: Rows, trained: Rows, parts: Sequence[Rows]) -> Rows:
    """The held-out rows that a client measures if each measures the groups it trains on, sorted.

    Args:
        client: whose.
        held_out: ``[M]`` the groups of the held-out rows.
        trained: ``[N]`` those of the training rows.
        parts: which of these each client holds that measures; those that train on a group take
            turns with its rows.
    """
    own = []
    for group in numpy.unique(trained[parts[client]]):
        sharing = [k for k, rows in enumerate(parts) if (trained[rows] == group).any()]
        own.append(numpy.flatnonzero(held_out == group)[sharing.index(client) :: len(sharing)])
    return numpy.sort(numpy.concatenate(own))


def skew(task: Task, parts: tuple[Rows, ...]) -> list[SkewRow]:
    """What each client holds, for a table or a picture."""
    return [
        SkewRow(
            client=client,
            examples=len(rows),
            labels=_counted(task.train.labels[rows], task.label_names),
            groups=_counted(task.train.groups[rows], task.group_names),
        )
        for client, rows in enumerate(parts)
    ]


def _together(parts: list[tuple[Examples, tuple[str, ...]]], names: tuple[str, ...]) -> Examples:
    """Several clients' examples one after the other, with their groups numbered as ``names``."""
    images = [examples.images for examples, _ in parts if examples.images is not None]
    groups = [
        numpy.array([names.index(own[code]) for code in examples.groups], dtype=numpy.int64)
        for examples, own in parts
    ]
    return Examples(
        labels=numpy.concatenate([examples.labels for examples, _ in parts]),
        groups=numpy.concatenate(groups),
        natural=tuple(name for examples, _ in parts for name in examples.natural),
        texts=tuple(text for examples, _ in parts for text in examples.texts),
        images=numpy.concatenate(images) if images else None,
        prompts=tuple(prompt for examples, _ in parts for prompt in examples.prompts),
    )


def _by_group(task: Task, clients: ClientsConfig) -> tuple[Rows, ...]:
    names = task.group_names
    if clients.number != len(names):
        allowed = f"{len(names)}, one per group of {task.name!r} ({', '.join(names)})"
        raise wrong("clients.number", clients.number, allowed)
    return tuple(numpy.flatnonzero(task.train.groups == k) for k in range(len(names)))


def _counted(codes: Rows, names: tuple[str, ...]) -> dict[str, int]:
    counts = numpy.bincount(codes, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=False)}


def _listed(numbers: list[int]) -> str:
    """The first few numbers, and how many more there are."""
    shown = ", ".join(str(number) for number in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
