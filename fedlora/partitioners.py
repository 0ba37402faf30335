"""Dealing rows by flwr-datasets' own partitioners, which are given them in a seeded order."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from fedlora import seeds
from fedlora.config import ClientsConfig
from fedlora.errors import ConfigError, wrong
from fedlora.tasks.task import Task

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Rows = NDArray[numpy.int64]


def by_source(task: Task, clients: ClientsConfig, seed: int) -> tuple[Rows, ...]:
    """One natural source for each client; see ``partition``.

    Raises:
        ConfigError: there are not enough sources.
    """
    sizes = Counter(task.train.natural)
    large = sorted(name for name, size in sizes.items() if size >= clients.min_examples)
    if clients.number > len(large):
        allowed = (
            f"at most {len(large)}, the natural sources of {task.name!r} with at least "
            f"{clients.min_examples} training examples"
        )
        raise wrong("clients.number", clients.number, allowed)
    from flwr_datasets.partitioner import NaturalIdPartitioner

    generator = seeds.numpy_generator(seed, "partition")
    chosen = numpy.sort(generator.choice(len(large), clients.number, replace=False))
    kept = {large[source] for source in chosen}
    rows = numpy.array([row for row, name in enumerate(task.train.natural) if name in kept])
    return _deal(task, rows, NaturalIdPartitioner(partition_by="natural"))


def by_library(task: Task, clients: ClientsConfig, seed: int) -> tuple[Rows, ...]:
    """All rows, iid or with skewed labels; see ``partition``.

    Raises:
        ConfigError: there are too few rows or classes, or the library gives up.
    """
    from flwr_datasets.partitioner import IidPartitioner, PathologicalPartitioner

    if clients.number > len(task.train):
        allowed = f"at most {len(task.train)}, the training examples of {task.name!r}"
        raise wrong("clients.number", clients.number, allowed)
    present = len(numpy.unique(task.train.labels))
    if clients.split == "pathological" and clients.classes > present:
        allowed = f"at most {present}, the classes of {task.name!r}"
        raise wrong("clients.classes", clients.classes, allowed)
    narrow = seeds.derive(seed, "partition", "library") % 2**32
    partitioner: Partitioner
    if clients.split == "iid":
        partitioner = IidPartitioner(num_partitions=clients.number)
    elif clients.split == "dirichlet":
        partitioner = _dirichlet(clients, clients.number, narrow)
    else:
        partitioner = PathologicalPartitioner(
            num_partitions=clients.number,
            partition_by="label",
            num_classes_per_partition=clients.classes,
            class_assignment_mode="first-deterministic",
            seed=narrow,
        )
    order = seeds.numpy_generator(seed, "partition").permutation(len(task.train))
    try:
        return _deal(task, order, partitioner)
    except ValueError as error:
        raise _refused(clients, clients.number, str(error)) from None


def within_groups(task: Task, clients: ClientsConfig, seed: int) -> tuple[Rows, ...]:
    """Each group's rows dealt to its own clients with skewed labels; see ``partition``.

    What a group's clients get does not depend on the other groups.

    Raises:
        ConfigError: a group has no client, or too few rows, or the library gives up.
    """
    names = task.group_names
    if clients.number < len(names):
        allowed = f"at least {len(names)}, the groups of {task.name!r} ({', '.join(names)})"
        raise wrong("clients.number", clients.number, allowed)
    parts: dict[int, Rows] = {}
    for group, name in enumerate(names):
        rows = numpy.flatnonzero(task.train.groups == group)
        own = range(group, clients.number, len(names))
        if len(own) > len(rows):
            raise ConfigError(
                f"clients.number: group {name!r} of {task.name!r} has {len(rows)} training "
                f"examples for {len(own)} clients; lower clients.number"
            )
        order = seeds.numpy_generator(seed, "partition", "group", name).permutation(rows)
        narrow = seeds.derive(seed, "partition", "group", name, "library") % 2**32
        try:
            dealt = _deal(task, order, _dirichlet(clients, len(own), narrow))
        except ValueError as error:
            raise _refused(clients, len(own), str(error), f" of group {name!r}") from None
        parts |= dict(zip(own, dealt, strict=True))
    return tuple(parts[client] for client in range(clients.number))


def _dirichlet(clients: ClientsConfig, number: int, seed: int) -> Partitioner:
    """Flower's Dirichlet partitioner over labels."""
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        num_partitions=number,
        partition_by="label",
        alpha=clients.alpha,
        min_partition_size=clients.min_examples,
        seed=seed,
    )


def _deal(task: Task, rows: Rows, by_library: Partitioner) -> tuple[Rows, ...]:
    """What flwr-datasets makes of the given rows."""
    import datasets

    by_library.dataset = datasets.Dataset.from_dict(
        {
            "row": rows,
            "label": task.train.labels[rows],
            "group": task.train.groups[rows],
            "natural": [task.train.natural[row] for row in rows],
        }
    )
    with _quiet():
        parts = [by_library.load_partition(k)["row"] for k in range(by_library.num_partitions)]
    return tuple(numpy.sort(numpy.asarray(part, dtype=numpy.int64)) for part in parts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bar and its warning at each new try."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refused(clients: ClientsConfig, number: int, reason: str, whose: str = "") -> ConfigError:
    """The library's refusal in our words."""
    if clients.split in ("dirichlet", "group_dirichlet"):
        return ConfigError(
            f"clients.alpha: with alpha {clients.alpha}, 11 draws left one of {number} "
            f"clients{whose} with fewer than {clients.min_examples} examples each time; raise "
            "clients.alpha, or lower clients.number or clients.min_examples"
        )
    first = reason.split(". ")[0]
    return ConfigError(f"clients: the {clients.split} split is not possible: {first}")
