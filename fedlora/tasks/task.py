"""What a task is: labelled examples in named groups, dealt to clients elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy
from numpy.typing import NDArray

Objective = Literal["classify", "language"]


@dataclass(frozen=True)
class Examples:
    """A table of examples, one row each.

    Attributes:
        texts: for text tasks, else empty.
        prompts: for language modelling, what stands before each text and is given, not learned;
            empty for none.
        images: ``[N, channels, height, width]`` float32 in [0, 1] for image tasks, else None.
        labels: ``[N]`` int64; all 0 for language modelling.
        groups: ``[N]`` int64 into the task's ``group_names``.
        natural: ``[N]`` who wrote or drew the example, for the ``natural`` split.

    Raises:
        ValueError: the columns do not have one length.
    """

    labels: NDArray[numpy.int64]
    groups: NDArray[numpy.int64]
    natural: tuple[str, ...]
    texts: tuple[str, ...] = ()
    images: NDArray[numpy.float32] | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        inputs = len(self.texts) if self.images is None else len(self.images)
        prompts = len(self.prompts) or inputs
        if {len(self.labels), len(self.groups), len(self.natural), prompts} != {inputs}:
            raise ValueError(
                f"{inputs} inputs, {len(self.labels)} labels, {len(self.groups)} groups, "
                f"{len(self.natural)} natural ids, {prompts} prompts: all must be equal"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[numpy.int64]) -> Examples:
        """The given rows, in the given order."""
        return Examples(
            labels=self.labels[rows],
            groups=self.groups[rows],
            natural=tuple(self.natural[row] for row in rows),
            texts=tuple(self.texts[row] for row in rows) if self.texts else (),
            images=None if self.images is None else self.images[rows],
            prompts=tuple(self.prompts[row] for row in rows) if self.prompts else (),
        )


class AtClients(Protocol):
    """Where each client's own rows are."""

    def task_of(self, client: int, data: str = "", held_out: str = "") -> Task:
        """One client's rows as a task by itself.

        ``data`` and ``held_out`` are places that stand in for those of the recipe.

        Raises:
            DataError: rows that cannot be read.
            ConfigError: no place is named.
        """
        ...

    def state_of(self, client: int, data: str = "", held_out: str = "") -> object:
        """What changes when a file there is written, or something is put into a folder there."""
        ...


@dataclass(frozen=True)
class Task:
    """A data set with its held-out parts.

    ``validation`` chooses settings, ``test`` measures; rows of one natural source (an
    article, a review) never lie in two parts, unless the task says so. Where ``at_clients`` is not
    None, the rows are the clients' own, and none are here.
    """

    name: str
    objective: Objective
    label_names: tuple[str, ...]
    group_names: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    at_clients: AtClients | None = None
