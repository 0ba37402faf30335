"""Labelled pictures from a folder: one subfolder per label, or a table that names their files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from fedlora.errors import ConfigError, DataError
from fedlora.tasks.tables import READERS, read_table

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
BILINEAR = 2  # Pillow's number of it
TABLE, FILE = "labels", "file"  # of the table that names files, and its column of them


@dataclass(frozen=True)
class Look:
    """How pictures come to be alike.

    Attributes:
        size: pixels of both sides; 0 leaves them, and all must be of one size.
        grey: one channel instead of red, green and blue.
    """

    size: int = 0
    grey: bool = False


def read_pictures(
    folder: Path, labels: Sequence[str], columns: Sequence[str], look: Look
) -> tuple[NDArray[numpy.float32], list[tuple[str, list[str]]]]:
    """Pictures ``[N, channels, height, width]`` in [0, 1], and each one's place and cells.

    ``columns`` are those of the table ``labels.csv`` (or another of its kinds) beside ``file``;
    the first holds the label. Without a table the subfolders are the labels, in their order, and
    there is no other column.

    Raises:
        DataError: pictures or their table cannot be read, or are not all alike.
    """
    tables = [path for end in READERS if (path := folder / f"{TABLE}{end}").is_file()]
    if tables:
        named = [
            (place, _inside(folder, tables[0], place, file), cells)
            for place, (file, *cells) in read_table(tables[0], [FILE, *columns])
        ]
    else:
        named = _by_subfolder(folder, labels, columns)
    if not named:
        raise DataError(f"{folder}: found no pictures, allowed: {', '.join(ENDINGS)}")
    images: list[NDArray[numpy.float32]] = []
    for _, path, _ in named:
        image = _read(path, look)
        if images and image.shape != images[0].shape:
            found, first = (" x ".join(map(str, one.shape[1:])) for one in (image, images[0]))
            raise DataError(
                f"{path}: found {found} pixels, allowed: {first} as {named[0][1].name}; or set "
                "task.options.size"
            )
        images.append(image)
    return numpy.stack(images), [(place, cells) for place, _, cells in named]


def pixels(image: Image.Image, look: Look) -> NDArray[numpy.float32]:
    """A picture as ``[channels, height, width]`` in [0, 1].

    Raises:
        OSError, ValueError: it is broken; Pillow raises others too.
    """
    alike = image.convert("L" if look.grey else "RGB")
    if look.size:
        alike = alike.resize((look.size, look.size), BILINEAR)
    values = numpy.asarray(alike, dtype=numpy.float32) / numpy.float32(255)
    return values[None] if look.grey else values.transpose(2, 0, 1)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder by name, numbers by size; hidden things are passed over.

    Raises:
        DataError: it is no folder, or cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None

    def by_number(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.findall(r"\d+|\D+", path.name)
        return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]

    return sorted(found, key=by_number)


def _by_subfolder(
    folder: Path, labels: Sequence[str], columns: Sequence[str]
) -> list[tuple[str, Path, list[str]]]:
    """Place, path and label of each picture."""
    if len(columns) > 1:
        table = f"{TABLE}.csv with columns {FILE}, {', '.join(columns)}"
        raise DataError(f"{folder}: found no table, allowed: {table}")
    named = []
    for inner in entries(folder):
        if inner.is_dir() and inner.name not in labels:
            raise DataError(f"{folder}: found {inner.name!r}, allowed: {', '.join(labels)}")
    for label in labels:
        if (folder / label).is_dir():
            paths = [path for path in entries(folder / label) if path.suffix.lower() in ENDINGS]
            named += [(path.name, path, [label]) for path in paths]
    return named


def _inside(folder: Path, table: Path, place: str, name: str) -> Path:
    """The picture that a row names; none outside its folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{table}, {place}: found a file outside {folder}", place)
    return path


def _read(path: Path, look: Look) -> NDArray[numpy.float32]:
    """One picture, ``[channels, height, width]``."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("task 'local': pictures need Pillow; run: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return pixels(opened, look)
    except FileNotFoundError:
        raise DataError(f"{path}: found no such file") from None
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not a whole picture: {reason}") from None
