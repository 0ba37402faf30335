"""A task with the sizes that its recipe declares, for a dry run where the data is not here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from fedlora.config import TaskConfig
from fedlora.tasks.split import TEST, VALIDATION
from fedlora.tasks.task import Examples, Objective, Task


@dataclass(frozen=True)
class Declared:
    """What a recipe says of its data, which nobody read.

    Attributes:
        rows: of the published training part; after the validation part is cut, ``kept`` of them.
        labels: 0 for language modelling.
        groups: one at least.
        picture_bytes: of all pictures that train, in memory; 0 for texts.
    """

    rows: int
    kept: int
    labels: int
    groups: int
    picture_bytes: int


def declared(config: TaskConfig) -> tuple[Task, Declared] | None:
    """A task of empty texts by ``task.options.declared_*`` of a valid ``hub`` task.

    Labels and groups are even, and so is each label in each group, which they hardly are. None
    where no rows are declared.
    """
    options = config.options
    rows, labels, groups = (_count(options.get(f"declared_{of}", 0)) for of in SIZES)
    if not rows:
        return None
    groups = max(1, groups)
    kept = round(rows * _share(bool(options.get("test", "test"))))
    each = numpy.arange(kept, dtype=numpy.int64)
    labels = labels if options.get("label", "label") else 0
    train = Examples(
        labels=each % labels if labels else numpy.zeros_like(each),
        groups=each // max(1, labels) % groups,
        natural=("",) * kept,
        texts=("",) * kept,
    )
    none = train.take(each[:0])
    label_names, group_names = (tuple(map(str, range(count))) for count in (labels, groups))
    size = _count(options.get("size", 0)) if options.get("image") else 0
    picture = 4 * size * size * (1 if options.get("grey") else 3)
    objective: Objective = "classify" if labels else "language"
    task = Task(config.name, objective, label_names, group_names, train, none, none)
    return task, Declared(rows, kept, labels, groups, kept * picture)


def _share(tested: bool) -> float:
    """Of the published training part, what trains: less if the test part is cut from it too."""
    return 1 - VALIDATION / (1 - TEST) if tested else 1 - VALIDATION - TEST


SIZES = ("rows", "labels", "groups")


def _count(found: object) -> int:
    """An option that was checked before."""
    return found if isinstance(found, int) else 0
