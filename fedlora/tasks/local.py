"""Rows that each client has itself: a file or a folder of its own, and nothing in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy
from numpy.typing import NDArray
from pydantic import Field

from fedlora.errors import ConfigError, DataError, wrong
from fedlora.options import Below1, CountOrZero, Names
from fedlora.tasks.pictures import Look, entries, read_pictures
from fedlora.tasks.split import position, positions, text_key
from fedlora.tasks.tables import read_table, shown
from fedlora.tasks.task import Examples, Objective, Task

CLIENT = "{client}"
NONE = numpy.zeros(0, dtype=numpy.int64)


def local(
    path: str = "",
    labels: Names = (),
    text: str = "text",
    second: str = "",
    separator: str = " ",
    label: str = "label",
    group: str = "",
    natural: str = "",
    held_out: str = "",
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    validation: Below1 = 0.1,
    size: CountOrZero = 0,
    grey: bool = False,
) -> Task:
    """Each client's own rows, from a CSV, JSON lines or parquet file or a folder of pictures.

    ``path`` holds ``{client}``, a client's number from 0, or is a folder whose k-th entry by name
    is client k's; in a deployment each node names its own instead. ``labels`` are the classes in
    order; none is language modelling. ``text``, ``second`` (put after it, behind ``separator``),
    ``label``, ``group`` and ``natural`` name columns; without ``group`` each client is a group.
    Of a client's sources (rows, without ``natural``) a share ``test`` measures and a share
    ``validation`` chooses settings, picked by a hash of what is in them; with ``held_out``, a place
    like ``path``, all rows of that measure. Pictures lie in subfolders named by their labels, or
    ``labels.csv`` names each ``file`` and its columns; ``size`` and ``grey`` make them alike.

    Raises:
        ConfigError: a single label, or a label twice.
    """
    if len(labels) == 1 or len(set(labels)) < len(labels):
        allowed = "two or more different names, or none for language modelling"
        raise wrong("task.options.labels", list(labels), allowed)
    objective: Objective = "classify" if labels else "language"
    columns = Columns(text, second, separator, label if labels else "", group, natural)
    files = Files(path, held_out, labels, columns, Look(size, grey), test, validation)
    none = Examples(labels=NONE, groups=NONE, natural=())
    return Task("local", objective, labels, (), none, none, none, files)


@dataclass(frozen=True)
class Columns:
    """What a row's columns are called; see ``local``."""

    text: str
    second: str
    separator: str
    label: str
    group: str
    natural: str


@dataclass(frozen=True)
class Files:
    """Where each client's own rows are, and how they are read; see ``local``."""

    path: str
    held_out: str
    labels: tuple[str, ...]
    columns: Columns
    look: Look
    test: float
    validation: float

    def task_of(self, client: int, data: str = "", held_out: str = "") -> Task:
        """See ``AtClients``."""
        objective: Objective = "classify" if self.labels else "language"
        places = self._places(client, data, held_out)
        names, tables = _with_groups([self._read(path, client) for path in places])
        order, taken = _in_order(tables[0]), 0
        if len(tables) == 1:
            taken = _cut(order, self.test, 0, client)
            tables.append(tables[0].take(numpy.sort(order.rows[:taken])))
        chosen = _cut(order, self.validation, taken, client) if self.validation else taken
        return Task(
            name="local",
            objective=objective,
            label_names=self.labels,
            group_names=names,
            train=tables[0].take(numpy.sort(order.rows[chosen:])),
            validation=tables[0].take(numpy.sort(order.rows[taken:chosen])),
            test=tables[1],
        )

    def state_of(self, client: int, data: str = "", held_out: str = "") -> object:
        """See ``AtClients``."""
        places = self._places(client, data, held_out)
        found = [(path, path.stat()) for path in places if path.exists()]
        return [(path, one.st_mtime_ns, one.st_size) for path, one in found]

    def _places(self, client: int, data: str, held_out: str) -> list[Path]:
        """Where a client's rows are, and behind it where those that measure are, if apart."""
        if self.held_out and data and not held_out:
            raise ConfigError(
                f"client {client}: the recipe has held-out rows in a place of their own "
                "(task.options.held_out); its node's config must name them too, as 'held-out'"
            )
        places = [Path(data) if data else _place("path", self.path, client)]
        if held_out or self.held_out:
            apart = Path(held_out) if held_out else _place("held_out", self.held_out, client)
            places.append(apart)
        return places

    def _read(self, path: Path, client: int) -> tuple[Examples, list[str]]:
        """All rows of one place, in its order, with the name of each one's group."""
        columns = self.columns
        extra = [name for name in (columns.group, columns.natural) if name]
        images: NDArray[numpy.float32] | None = None
        texts: tuple[str, ...] = ()
        if path.is_dir():
            if not self.labels:
                raise DataError(f"{path}: found a folder, allowed: a file of texts, without labels")
            images, rows = read_pictures(path, self.labels, [columns.label, *extra], self.look)
        else:
            inputs = [name for name in (columns.text, columns.second) if name]
            labels = [columns.label] if columns.label else []
            found = read_table(path, [*inputs, *labels, *extra])
            rows = [(place, cells[len(inputs) :]) for place, cells in found]
            texts = tuple(columns.separator.join(cells[: len(inputs)]) for _, cells in found)
        codes = [self._code(path, *row) if self.labels else 0 for row in rows]
        groups = [
            cells[bool(columns.label)] if columns.group else f"client-{client}" for _, cells in rows
        ]
        if columns.natural:
            sources = [cells[-1] for _, cells in rows]
        elif images is None:
            sources = [text_key(text) for text in texts]
        else:
            sources = [f"{position('local', image.tobytes()):.17f}" for image in images]
        zeros = numpy.zeros(len(rows), dtype=numpy.int64)
        labels_of = numpy.array(codes, dtype=numpy.int64)
        return Examples(labels_of, zeros, tuple(sources), texts, images), groups

    def _code(self, path: Path, place: str, cells: list[str]) -> int:
        """A row's label."""
        if cells[0] not in self.labels:
            allowed = ", ".join(self.labels)
            raise DataError(f"{path}, {place}: found {shown(cells[0])}, allowed: {allowed}", place)
        return self.labels.index(cells[0])


@dataclass(frozen=True)
class Order:
    """Rows by the hash of their sources: each source's together, in the order of its file."""

    rows: NDArray[numpy.int64]
    ends: NDArray[numpy.int64]


def _in_order(examples: Examples) -> Order:
    """The rows in order, and where each source ends in it."""
    place = positions("local", examples.natural)
    rows = numpy.argsort(place, kind="stable")
    ends = numpy.flatnonzero(numpy.diff(place[rows], append=numpy.inf)) + 1
    return Order(rows, ends)


def _cut(order: Order, share: float, start: int, client: int) -> int:
    """Where a share of all rows, one at least, ends behind ``start``: at a source's end.

    Raises:
        DataError: nothing would be left to train on.
    """
    total = len(order.rows)
    wanted = start + max(1, round(share * total))
    end = int(order.ends[numpy.searchsorted(order.ends, wanted)]) if wanted <= total else total
    if end >= total:
        raise DataError(
            f"client {client}: found {len(order.ends)} source(s) in {total} row(s), allowed: "
            "enough to train on and to hold out (task.options.test and validation)"
        )
    return end


def _with_groups(
    parts: list[tuple[Examples, list[str]]],
) -> tuple[tuple[str, ...], list[Examples]]:
    """The names of all groups, sorted, and the parts with their numbers."""
    names = tuple(sorted({name for _, groups in parts for name in groups}))
    code = {name: number for number, name in enumerate(names)}
    tables = []
    for examples, groups in parts:
        numbers = numpy.array([code[name] for name in groups], dtype=numpy.int64)
        own = (examples.labels, numbers, examples.natural, examples.texts, examples.images)
        tables.append(Examples(*own))
    return names, tables


def _place(option: str, path: str, client: int) -> Path:
    """Where a client's rows are by the recipe.

    Raises:
        ConfigError: it names no place.
        DataError: the place that it names has none for this client.
    """
    if CLIENT in path:
        return Path(path.replace(CLIENT, str(client)))
    where = f"task.options.{option}"
    if not path or not Path(path).is_dir():
        allowed = (
            f"a path with {CLIENT}, or a folder with an entry for each client; in a deployment, "
            "each node names its own as 'data' in its node config"
        )
        raise wrong(where, path, allowed)
    there = _entries(path, Path(path).stat().st_mtime_ns)
    if client >= len(there):
        raise DataError(f"{where}: found {len(there)} entries in {path}, none for client {client}")
    return there[client]


@lru_cache(maxsize=8)
def _entries(folder: str, changed: int) -> list[Path]:
    """``entries``, read again when something is put into the folder."""
    return entries(Path(folder))
