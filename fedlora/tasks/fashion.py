"""Fashion-MNIST: 28x28 pictures of clothes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy
from numpy.typing import NDArray

from fedlora import fetch
from fedlora.errors import ConfigError
from fedlora.options import Count
from fedlora.tasks.split import VALIDATION, positions
from fedlora.tasks.task import Examples, Task

LABELS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion(rows: Count = 20000) -> Task:
    """Fashion-MNIST (Xiao et al. 2017): clothes in 10 classes, 28x28 grey, one group.

    The test part is the official one. A tenth of the official training part, by hash, is the
    validation part; ``rows`` of the others (up to about 54,000) are trained on. Nobody is
    named as the author of a picture, so each is its own natural source.

    Raises:
        ConfigError: the files are not there, or are not what they should be.
    """
    folder = fetch.find("fashion")
    pixels = read_idx(folder / "train-images-idx3-ubyte.gz")  # [60000, 28, 28]
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
    place = positions("fashion", tuple(f"train-{row}" for row in range(len(labels))))
    order = numpy.argsort(place, kind="stable")
    held_out = int((place < VALIDATION).sum())
    return Task(
        name="fashion",
        objective="classify",
        label_names=LABELS,
        group_names=("fashion",),
        train=_examples("train", pixels, labels, order[held_out : held_out + rows]),
        validation=_examples("train", pixels, labels, order[:held_out]),
        test=_examples(
            "test",
            read_idx(folder / "t10k-images-idx3-ubyte.gz"),
            read_idx(folder / "t10k-labels-idx1-ubyte.gz"),
        ),
    )


def read_idx(path: Path) -> NDArray[numpy.uint8]:
    """The bytes of a gzipped IDX file, in its own shape.

    Raises:
        ConfigError: the file is not IDX of unsigned bytes, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); install it again") from None
    dimensions = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in numpy.frombuffer(data[4:start], dtype=">i4"))
    if not dimensions or len(data) - start != numpy.prod(shape):
        raise ConfigError(f"{path}: not a complete IDX file of bytes; install it again")
    return numpy.frombuffer(data, dtype=numpy.uint8, offset=start).reshape(shape)


def _examples(
    part: str,
    pixels: NDArray[numpy.uint8],
    labels: NDArray[numpy.uint8],
    rows: NDArray[numpy.int64] | None = None,
) -> Examples:
    """The given rows (all by default), in file order."""
    rows = numpy.arange(len(labels)) if rows is None else numpy.sort(rows)
    return Examples(
        labels=labels[rows].astype(numpy.int64),
        groups=numpy.zeros(len(rows), dtype=numpy.int64),
        natural=tuple(f"{part}-{row}" for row in rows),
        images=pixels[rows, None].astype(numpy.float32) / numpy.float32(255),
    )
