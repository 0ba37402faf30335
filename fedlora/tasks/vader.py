"""Sentences of four kinds with human sentiment ratings."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy
from pydantic import Field, Strict

from fedlora import fetch
from fedlora.errors import ConfigError
from fedlora.tasks.split import divide, text_key
from fedlora.tasks.task import Examples, Task

Labels = Literal["binary", "ternary"]
Group = Literal["tweets", "movie", "amazon", "nyt"]
Groups = Annotated[tuple[Group, ...], Strict(False), Field(min_length=1)]

FILES: dict[Group, str] = {
    "tweets": "tweets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
GROUPS: tuple[Group, ...] = ("tweets", "movie", "amazon", "nyt")
IN_ARTICLES = ("amazon", "nyt")
LABEL_NAMES: dict[Labels, tuple[str, ...]] = {
    "binary": ("negative", "positive"),
    "ternary": ("negative", "neutral", "positive"),
}
CLEAR = 0.5


@dataclass(frozen=True)
class Rated:
    """One sentence.

    Attributes:
        group: index into the task's groups.
        natural: the review, article or row it comes from.
        rating: mean of at least 20 people's ratings, in [-4, 4].
        text: as the file has it.
    """

    group: int
    natural: str
    rating: float
    text: str


def vader(labels: Labels = "binary", groups: Groups = GROUPS) -> Task:
    """Positive or negative: tweets, movie and product reviews, editorials (Hutto, Gilbert 2014).

    ``binary`` keeps sentences rated at least 0.5 away from 0; ``ternary`` calls the others
    neutral. A natural source is a review (amazon), an article (nyt) or a row (the others).
    Leaving groups out moves no sentence from one part to another.

    Raises:
        ConfigError: the data has not been fetched, or its file is damaged.
    """
    kept = tuple(name for name in GROUPS if name in groups)
    everything = distinct(read(fetch.find("vader")))
    rows = [
        replace(row, group=kept.index(GROUPS[row.group]))
        for row in everything
        if GROUPS[row.group] in kept
    ]
    return divide("vader", LABEL_NAMES[labels], kept, labelled(rows, labels))


def read(path: Path) -> list[Rated]:
    """All sentences of the source distribution, in the order of ``GROUPS``.

    Raises:
        ConfigError: the archive is not what it should be.
    """
    try:
        with tarfile.open(path) as outer:
            inner = _member(outer, "additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            files = [_member(archive, FILES[name]).decode() for name in GROUPS]
        return [
            row
            for group, text in enumerate(files)
            for row in _rows(GROUPS[group], group, text.split("\n"))
        ]
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError):
        raise ConfigError(f"{path}: damaged; remove it and run: fedlora fetch vader") from None


def distinct(rows: Iterable[Rated]) -> list[Rated]:
    """The rows less those whose text came before."""
    first: dict[str, Rated] = {}
    for row in rows:
        first.setdefault(text_key(row.text), row)
    return list(first.values())


def labelled(rows: Iterable[Rated], labels: Labels) -> Examples:
    """Examples with labels from the ratings; ``binary`` leaves the neutral rows out."""
    kept = [row for row in rows if labels == "ternary" or abs(row.rating) >= CLEAR]
    ratings = numpy.array([row.rating for row in kept])
    high, low = ratings >= CLEAR, ratings <= -CLEAR
    classes = high.astype(int) if labels == "binary" else 1 + high.astype(int) - low.astype(int)
    return Examples(
        labels=classes.astype(numpy.int64),
        groups=numpy.array([row.group for row in kept], dtype=numpy.int64),
        natural=tuple(row.natural for row in kept),
        texts=tuple(row.text for row in kept),
    )


def _rows(name: Group, group: int, lines: Iterable[str]) -> Iterable[Rated]:
    """Rows of ``id TAB rating TAB text``; amazon's and nyt's ids are ``source_sentence``."""
    for line in filter(None, lines):
        key, rating, text = line.split("\t", 2)
        source = key.split("_")[0] if name in IN_ARTICLES else key
        yield Rated(group, f"{name}-{source}", float(rating), text.strip())


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    """The content of the one file whose path ends so."""
    for member in archive:
        if member.isfile() and member.name.endswith("/" + ending):
            file = archive.extractfile(member)
            assert file is not None
            return file.read()
    raise KeyError(ending)
