"""Any labelled texts or images, or prompts with answers, that the ``datasets`` library loads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from fedlora.errors import ConfigError, MissingDataError
from fedlora.options import CountOrZero
from fedlora.tasks.pictures import Look, pixels
from fedlora.tasks.split import TEST, VALIDATION, divide, positions, without_duplicates
from fedlora.tasks.task import Examples, Objective, Task

if TYPE_CHECKING:
    from datasets import Dataset


def hub(
    path: str,
    text: str = "text",
    label: str = "label",
    group: str = "",
    natural: str = "",
    train: str = "train",
    test: str = "test",
    configuration: str = "",
    second: str = "",
    separator: str = " ",
    prompt: str = "",
    image: str = "",
    size: CountOrZero = 0,
    grey: bool = False,
    first_labels: CountOrZero = 0,
    declared_rows: CountOrZero = 0,
    declared_labels: CountOrZero = 0,
    declared_groups: CountOrZero = 0,
) -> Task:
    """Texts or images from the hub, or a local folder of CSV, JSON, Parquet or image files.

    ``path`` and ``configuration`` are those of ``datasets.load_dataset``; ``text``, ``second``
    (put after it, behind ``separator``), ``label``, ``group`` and ``natural`` name columns.
    ``label = ""`` is language modelling, of what follows ``prompt`` if that names a column.
    ``image`` names one of pictures, in place of texts, made alike by ``size`` (pixels of a side)
    and ``grey``. ``first_labels`` keeps the rows of so many labels alone. Without ``group`` there
    is one group, without ``natural`` each row is its own source. An eighth of the sources of
    ``train``, by hash, are the validation part. With ``test = ""`` all parts are cut from
    ``train``, 70/10/20. What is ``declared_``, of ``train`` as published, is for a dry run where
    the data is not here; see ``declared``.

    Raises:
        MissingDataError: the data is not here and cannot be fetched.
        ConfigError: it cannot be read, a column or a label is missing, or a natural source is in
            both ``train`` and ``test``.
    """
    columns = Columns(text, second, separator, prompt, image, label, group, natural)
    names = [name for name in (train, test) if name]
    tables = [_load(path, configuration, name) for name in names]
    for name, table in zip(names, tables, strict=True):
        for column in columns.named():
            if column not in table.column_names:
                found = ", ".join(table.column_names)
                raise ConfigError(
                    f"task.options: {path!r} has no column {column!r} in {name!r}; "
                    f"its columns: {found}"
                )
    return _task(path, tables, columns, Look(size, grey), first_labels)


@dataclass(frozen=True)
class Columns:
    """What a row's columns are called; see ``hub``."""

    text: str
    second: str
    separator: str
    prompt: str
    image: str
    label: str
    group: str
    natural: str

    def named(self) -> list[str]:
        """Those that must be there."""
        inputs = [self.image] if self.image else [self.prompt, self.text, self.second]
        return [name for name in (*inputs, self.label, self.group, self.natural) if name]


def _task(
    path: str, tables: list[Dataset], columns: Columns, look: Look, first_labels: int
) -> Task:
    """One task of a train table and, if there are two, a test table."""
    label_names, labels = _labels(path, tables, columns.label)
    if first_labels and first_labels < len(label_names):
        label_names, kept = label_names[:first_labels], labels < first_labels
        ends = numpy.cumsum([len(table) for table in tables])[:-1]
        tables = [
            table.select(numpy.flatnonzero(own))
            for table, own in zip(tables, numpy.split(kept, ends), strict=True)
        ]
        labels = labels[kept]
    group = columns.group
    group_names, groups = _codes(_strings(tables, group)) if group else (("all",), None)
    sizes = [len(table) for table in tables]
    part = numpy.repeat(numpy.arange(len(tables)), sizes)  # [N], 0 in train, 1 in test
    natural = columns.natural
    sources = _strings(tables, natural) if natural else [f"row-{row}" for row in range(len(part))]
    if straddling := set(sources[: sizes[0]]) & set(sources[sizes[0] :]):
        raise ConfigError(
            f"task.options.natural: source {min(straddling)!r} of {path!r} is in both train and "
            "test; give test = '' to cut all parts from train by source"
        )
    order = numpy.argsort(-part, kind="stable")  # a text in both parts stays in test
    examples = Examples(
        labels=labels,
        groups=numpy.zeros(len(part), dtype=numpy.int64) if groups is None else groups,
        natural=tuple(sources),
        **_inputs(tables, columns, look),
    )
    objective: Objective = "classify" if columns.label else "language"
    whole = without_duplicates(examples.take(order))
    if len(tables) == 1:
        return divide("hub", label_names, group_names, whole, objective)
    tested = set(sources[sizes[0] :])
    in_test = numpy.array([source in tested for source in whole.natural])
    held_out = positions("hub", whole.natural) < VALIDATION / (1 - TEST)
    return Task(
        name="hub",
        objective=objective,
        label_names=label_names,
        group_names=group_names,
        train=whole.take(numpy.flatnonzero(~in_test & ~held_out)),
        validation=whole.take(numpy.flatnonzero(~in_test & held_out)),
        test=whole.take(numpy.flatnonzero(in_test)),
    )


def _inputs(tables: list[Dataset], columns: Columns, look: Look) -> dict[str, Any]:
    """``texts`` and ``prompts``, or ``images``, of ``Examples`` (Any: these)."""
    if columns.image:
        return {"images": _pictures(tables, columns.image, look)}
    texts = _strings(tables, columns.text)
    if columns.second:
        pairs = zip(texts, _strings(tables, columns.second), strict=True)
        texts = [columns.separator.join(pair) for pair in pairs]
    prompts = _strings(tables, columns.prompt) if columns.prompt else []
    return {"texts": tuple(texts), "prompts": tuple(prompts)}


def _pictures(tables: list[Dataset], column: str, look: Look) -> NDArray[numpy.float32]:
    """All pictures of a column, ``[N, channels, height, width]`` in [0, 1]."""
    for table in tables:
        if type(table.features[column]).__name__ != "Image":
            what = f"a column of {table.features[column]}"
            raise ConfigError(f"task.options.image: found {what}, allowed: one of images")
    images = numpy.zeros(0, dtype=numpy.float32)
    for row, image in enumerate(_cells(tables, column)):
        found = _array(image, row, look)
        if not row:
            images = numpy.empty((sum(map(len, tables)), *found.shape), dtype=numpy.float32)
        if found.shape != images.shape[1:]:
            here, first = (" x ".join(map(str, one[-2:])) for one in (found.shape, images.shape))
            raise ConfigError(
                f"task.options.image: found {here} pixels in row {row}, allowed: {first} as in the "
                "first; or set task.options.size"
            )
        images[row] = found
    return images


def _array(image: Any, row: int, look: Look) -> NDArray[numpy.float32]:
    """One decoded picture (Any: Pillow's) as an array.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    if image is None:
        raise ConfigError(f"task.options.image: no picture in row {row}")
    try:
        return pixels(image, look)
    except (OSError, ValueError, SyntaxError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"task.options.image: row {row}: not a whole picture: {reason}") from None


def _cells(tables: list[Dataset], column: str) -> Iterator[Any]:
    """A column's cells, one after the other (Any: of whatever type)."""
    for table in tables:
        yield from table[column]


def _load(path: str, configuration: str, name: str) -> Dataset:
    """One named part of a data set."""
    import datasets

    showed, told = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said here, once
    try:
        with warnings.catch_warnings():
            # Its CSV reader leaves files for the garbage collector to close.
            warnings.simplefilter("ignore", ResourceWarning)
            return datasets.load_dataset(path, configuration or None, split=name)
    except Exception as error:  # the library's errors, its client's and its parsers' share no base
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        kind = ConfigError if Path(path).exists() else MissingDataError
        raise kind(
            f"task.options: {path!r}, part {name!r} cannot be loaded (offline?): {reason}"
        ) from None
    finally:
        datasets.logging.set_verbosity(told)
        if showed:
            datasets.enable_progress_bars()


def _strings(tables: list[Dataset], column: str) -> list[str]:
    """A column of all tables as text.

    Raises:
        ConfigError: a cell is empty.
    """
    cells = list(_cells(tables, column))
    if None in cells:
        raise ConfigError(
            f"task.options: column {column!r} has no value in row {cells.index(None)}"
        )
    return [str(cell) for cell in cells]


def _labels(
    path: str, tables: list[Dataset], column: str
) -> tuple[tuple[str, ...], NDArray[numpy.int64]]:
    """The label names and each row's label; named classes keep their order. Of none, all are 0."""
    import datasets

    if not column:
        return (), numpy.zeros(sum(map(len, tables)), dtype=numpy.int64)
    feature = tables[0].features[column]
    cells = _strings(tables, column)
    if not isinstance(feature, datasets.ClassLabel):
        return _codes(cells)
    codes = numpy.array([int(cell) for cell in cells], dtype=numpy.int64)
    if codes.min(initial=0) < 0:
        raise ConfigError(f"task.options: {path!r} has rows without a label; name another part")
    return tuple(feature.names), codes


def _codes(cells: Sequence[str]) -> tuple[tuple[str, ...], NDArray[numpy.int64]]:
    """The distinct values, whole numbers by size and words by spelling, and each row's index."""
    distinct = set(cells)
    whole = all(cell.removeprefix("-").isdecimal() for cell in distinct)
    names = sorted(distinct, key=int) if whole else sorted(distinct)
    index = {name: code for code, name in enumerate(names)}
    return tuple(names), numpy.array([index[cell] for cell in cells], dtype=numpy.int64)
