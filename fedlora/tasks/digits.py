"""Digits of three kinds: the same ten classes, seen very differently."""

from __future__ import annotations

import zipfile

import numpy

from fedlora import fetch
from fedlora.errors import ConfigError
from fedlora.tasks.split import divide, without_duplicates
from fedlora.tasks.task import Examples, Task

GROUPS = ("mnist", "optdigits", "typeset")
LABELS = tuple(str(digit) for digit in range(10))


def digits() -> Task:
    """Ten digits in three kinds: written (MNIST), scanned at 8x8 (optdigits), typeset.

    About 9,300 grey pictures of 28x28. The typeset ones are generated from fonts. Neither
    writers nor typesetters are known, so each picture is its own natural source.

    Raises:
        ConfigError: the digits have not been built, or their file is damaged.
    """
    path = fetch.find("digits")
    try:
        with numpy.load(path) as file:
            pixels = [file[name] for name in GROUPS]  # each [N, 28, 28] uint8
            labels = [file[f"{name}_labels"] for name in GROUPS]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise ConfigError(f"{path}: damaged; remove it and run: fedlora fetch digits") from None
    examples = Examples(
        labels=numpy.concatenate(labels).astype(numpy.int64),
        groups=numpy.repeat(numpy.arange(len(GROUPS)), [len(part) for part in labels]),
        natural=tuple(
            f"{name}-{row}"
            for name, part in zip(GROUPS, labels, strict=True)
            for row in range(len(part))
        ),
        images=numpy.concatenate(pixels)[:, None].astype(numpy.float32) / numpy.float32(255),
    )
    return divide("digits", LABELS, GROUPS, without_duplicates(examples))
