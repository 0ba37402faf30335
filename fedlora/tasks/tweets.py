"""Four hundred tweet-like texts that travel with the package: small, for tests and first runs."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import numpy

from fedlora.tasks.split import divide
from fedlora.tasks.task import Task
from fedlora.tasks.vader import LABEL_NAMES, Labels, Rated, labelled

FILE = "tweets.jsonl"
GROUPS = ("short", "long")
SHORT = 12


def tweets(labels: Labels = "binary") -> Task:
    """Positive or negative: 400 tweet-like texts that need no fetching, short and long.

    ``binary`` keeps the 320 rated at least 0.5 away from 0. A text of 12 words or fewer is
    short. Each row is its own natural source. The test part is too small to tell methods
    apart.
    """
    return divide("tweets", LABEL_NAMES[labels], GROUPS, labelled(read(), labels))


def tweets_lm() -> Task:
    """Language modelling on the 400 texts of ``tweets``: predict the next token."""
    examples = labelled(read(), "ternary")
    unlabelled = replace(examples, labels=numpy.zeros_like(examples.labels))
    return divide("tweets_lm", (), GROUPS, unlabelled, objective="language")


def read() -> list[Rated]:
    """The rows of the committed file, with the group by length."""
    text = resources.files("fedlora.tasks").joinpath(FILE).read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        row = json.loads(line)
        group = int(len(row["text"].split()) > SHORT)
        rows.append(Rated(group, f"tweets-{row['row']}", row["rating"], row["text"]))
    return rows
