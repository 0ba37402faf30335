"""Emoji in four styles of drawing: the same eight classes, drawn by four hands."""

from __future__ import annotations

import zipfile

import numpy
from numpy.typing import NDArray

from fedlora import fetch
from fedlora.emoji_images import LABELS, checksum
from fedlora.emoji_packages import PACKAGES
from fedlora.errors import ConfigError
from fedlora.tasks.split import divide
from fedlora.tasks.task import Examples, Task

GROUPS = tuple(package.group for package in PACKAGES)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def emoji(grey: bool = False) -> Task:
    """Eight kinds of emoji in four styles of drawing: noto, twemoji, openmoji, fluent.

    1,586 signs, each once in each style: 6,344 pictures of 28x28, red, green and blue, or of one
    channel where ``grey``. Dark and light are turned round, so that they lie on black as those do
    on which ``mixer`` was pretrained. A natural source is a sign (its code points), so that no
    part holds in one style what another part holds in another.

    The drawings are under Apache-2.0 (noto), CC-BY-4.0 (twemoji), CC-BY-SA-4.0 (openmoji) and MIT
    (fluent).

    Raises:
        ConfigError: the emoji have not been fetched, or their file is damaged.
    """
    path = fetch.find("emoji")
    try:
        with path.open("rb") as opened, numpy.load(opened) as file:
            arrays = {name: file[name] for name in ("codes", "labels", "checksum", *GROUPS)}
        if str(arrays["checksum"]) != checksum(arrays):
            raise ValueError("its checksum is another one")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise ConfigError(f"{path}: damaged; remove it and run: fedlora fetch emoji") from None
    signs = tuple(str(code) for code in arrays["codes"])
    examples = Examples(
        labels=numpy.tile(arrays["labels"].astype(numpy.int64), len(GROUPS)),
        groups=numpy.repeat(numpy.arange(len(GROUPS)), len(signs)),
        natural=signs * len(GROUPS),
        images=numpy.concatenate([images_of(arrays[group], grey) for group in GROUPS]),
    )
    return divide("emoji", LABELS, GROUPS, examples)


def images_of(pixels: NDArray[numpy.uint8], grey: bool) -> NDArray[numpy.float32]:
    """``[N, 3, height, width]`` in [0, 1] of ``[N, height, width, 3]``, one channel if ``grey``.

    Each is one minus what was drawn, or its luma.
    """
    inverse = (255 - pixels).astype(numpy.float32) / numpy.float32(255)
    channels = [inverse[..., at] for at in range(3)]
    if grey:
        parts = [numpy.float32(part) * each for part, each in zip(LUMA, channels, strict=True)]
        channels = [parts[0] + parts[1] + parts[2]]
    return numpy.stack(channels, axis=1)
