"""Dividing examples into train, validation and test by a hash that no run's seed can move."""

from __future__ import annotations

import hashlib
import re

import numpy
from numpy.typing import NDArray

from fedlora.tasks.task import Examples, Objective, Task

VALIDATION = 0.1
TEST = 0.2


def position(name: str, key: str | bytes) -> float:
    """Where ``key`` falls in [0, 1) for the task ``name``: a fixed, even spread (SHA-256)."""
    data = key.encode() if isinstance(key, str) else key
    digest = hashlib.sha256(name.encode() + b"\x1f" + data).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def positions(name: str, naturals: tuple[str, ...]) -> NDArray[numpy.float64]:
    """``position`` of each natural source; ``[N]``."""
    return numpy.array([position(name, natural) for natural in naturals], dtype=numpy.float64)


def text_key(text: str) -> str:
    """What makes a text itself: texts with equal keys are duplicates.

    Letter case, white space and punctuation do not count; in texts of fewer than four words
    punctuation does, as in ":(".
    """
    words = re.findall(r"[^\W_]+", text.casefold())
    return " ".join(words if len(words) >= 4 else text.casefold().split())


def without_duplicates(examples: Examples) -> Examples:
    """The examples less those whose input came before.

    Two texts are the same when their ``text_key`` is, two images when every pixel agrees.
    """
    seen: dict[bytes, int] = {}
    for row in range(len(examples)):
        seen.setdefault(hashlib.sha256(_content(examples, row)).digest(), row)
    return examples.take(numpy.array(list(seen.values()), dtype=numpy.int64))


def divide(
    name: str,
    label_names: tuple[str, ...],
    group_names: tuple[str, ...],
    examples: Examples,
    objective: Objective = "classify",
) -> Task:
    """A task with 70/10/20 % of the natural sources for train, validation and test.

    All rows of one source land in one part. Duplicates must have been dropped already.
    """
    place = positions(name, examples.natural)
    test = place < TEST
    validation = ~test & (place < TEST + VALIDATION)
    return Task(
        name=name,
        objective=objective,
        label_names=label_names,
        group_names=group_names,
        train=examples.take(numpy.flatnonzero(~test & ~validation)),
        validation=examples.take(numpy.flatnonzero(validation)),
        test=examples.take(numpy.flatnonzero(test)),
    )


def some_of_each_group(name: str, examples: Examples, rows: int) -> Examples:
    """At most ``rows`` examples of each group, chosen by a hash of what is in them.

    The choice is the same in every run, and a larger ``rows`` only adds to it.
    """
    chosen: list[int] = []
    for group in numpy.unique(examples.groups):
        members = [int(row) for row in numpy.flatnonzero(examples.groups == group)]
        members.sort(key=lambda row: (position(name, _content(examples, row)), row))
        chosen.extend(members[:rows])
    return examples.take(numpy.array(sorted(chosen), dtype=numpy.int64))


def _content(examples: Examples, row: int) -> bytes:
    """The bytes that say what an example is."""
    if examples.images is not None:
        pixels: bytes = examples.images[row].tobytes()
        return pixels
    prompt = f"{text_key(examples.prompts[row])}\x1f" if examples.prompts else ""
    return f"{prompt}{text_key(examples.texts[row])}".encode()
