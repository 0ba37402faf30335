"""Rendering emoji: the same signs as 28x28 pictures in each style of drawing."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from fedlora.emoji_packages import PACKAGES
from fedlora.errors import ConfigError

SIZE = 28
LABELS = (
    "activities",
    "animals",
    "food",
    "objects",
    "people",
    "smileys",
    "symbols",
    "travel",
)  # noto's categories by their first words; flags are left out
SORTED_BY = "noto"  # whose categories are the labels
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
WHITE = "#ffffff"

Table = dict[str, Any]  # Any: JSON values of several kinds
Arrays = dict[str, NDArray[numpy.generic]]


@dataclass(frozen=True)
class Drawings:
    """What an archive holds.

    Attributes:
        icons: Iconify's ``icons.json``: bodies of SVGs by name, aliases, width and height.
        names: of the icons by code points, such as ``1f469-200d-1f680``.
        categories: names of icons by category; empty where the archive has none.
    """

    icons: Table
    names: dict[str, str]
    categories: dict[str, list[str]]


def build(archives: Mapping[str, Path], tell: Callable[[str], None]) -> Arrays:
    """The signs that all styles have, in each of them.

    Variants by skin tone and what noto calls flags, or has in no category, are left out.

    Returns ``codes`` ``[N]`` (code points in hexadecimal, sorted), ``labels`` ``[N]`` int64 into
    ``LABELS``, for each group its pixels ``[N, 28, 28, 3]`` uint8 on white, ``about`` (packages,
    licences and renderer, in JSON) and ``checksum``, see ``checksum``.

    Raises:
        ConfigError: a drawing cannot be read or rendered.
    """
    drawings = {group: read_archive(path) for group, path in archives.items()}
    labels = labels_of(drawings)
    codes = sorted(labels)
    arrays: Arrays = {
        "codes": numpy.array(codes),
        "labels": numpy.array([labels[code] for code in codes], dtype=numpy.int64),
    }
    for number, (group, drawn) in enumerate(drawings.items(), 1):
        tell(f"emoji: rendering {len(codes)} of {group} ({number} of {len(drawings)})")
        pictures = [render(svg(drawn, code, group), f"{group}'s {code}") for code in codes]
        arrays[group] = numpy.stack(pictures)
    arrays["about"] = numpy.array(_about())
    arrays["checksum"] = numpy.array(checksum(arrays))
    return arrays


def check_packages() -> None:
    """Make sure that there is what renders.

    Raises:
        ConfigError: a package of the extra ``data`` is missing.
    """
    for package in ("resvg_py", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"emoji: the package {package!r} is not installed; "
                "run: python -m pip install 'fedlora[data]'"
            )


def read_archive(path: Path) -> Drawings:
    """The drawings of one of npm's archives, which is not unpacked.

    Raises:
        ConfigError: it is not such an archive.
    """
    try:
        with tarfile.open(path) as archive:
            icons, names, more = (
                json.loads(_member(archive, f"package/{name}.json"))
                for name in ("icons", "chars", "metadata")
            )
        return Drawings(icons, names, more.get("categories", {}))
    except (OSError, EOFError, tarfile.TarError, zlib.error, KeyError, ValueError):
        raise ConfigError(f"{path}: damaged, or no Iconify package; remove it") from None


def labels_of(drawings: Mapping[str, Drawings]) -> dict[str, int]:
    """By code points, the label of each sign that every style has."""
    first = drawings[SORTED_BY]
    category = {
        name: title.lower().split()[0]
        for title, names in first.categories.items()
        for name in names
    }
    labels = {}
    for code in set.intersection(*(set(drawn.names) for drawn in drawings.values())):
        label = category.get(first.names[code], "")
        if label in LABELS and not SKIN_TONES & set(code.split("-")):
            labels[code] = LABELS.index(label)
    return labels


def svg(drawn: Drawings, code: str, group: str) -> str:
    """The drawing of a sign, in the middle of a square.

    Raises:
        ConfigError: it is turned in a way that is not known here, or is not there.
    """
    name, flipped = drawn.names[code], False
    icons, aliases = drawn.icons["icons"], drawn.icons.get("aliases", {})
    while name in aliases and name not in icons:
        if odd := set(aliases[name]) - {"parent", "hFlip"}:
            raise ConfigError(f"emoji: {group}'s {name}: found {sorted(odd)}, allowed: hFlip")
        flipped ^= bool(aliases[name].get("hFlip"))
        name = aliases[name]["parent"]
    if name not in icons:
        raise ConfigError(f"emoji: {group}'s {name} ({code}): found no drawing")
    icon = {"left": 0, "top": 0, **_size(drawn.icons), **icons[name]}
    width, height = icon["width"], icon["height"]
    side = max(width, height)
    corner = f"{icon['left'] - (side - width) / 2} {icon['top'] - (side - height) / 2}"
    body = icon["body"]
    if flipped:
        body = f'<g transform="translate({2 * icon["left"] + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{corner} {side} {side}" width="{side}" height="{side}">{body}</svg>'
    )


def render(drawing: str, whose: str) -> NDArray[numpy.uint8]:
    """``[28, 28, 3]`` red, green and blue on white, by resvg.

    Raises:
        ConfigError: it is no SVG, or nothing of it can be seen; ``whose`` is named.
    """
    import resvg_py
    from PIL import Image

    try:
        data: bytes = resvg_py.svg_to_bytes(
            svg_string=drawing, width=SIZE, height=SIZE, background=WHITE, skip_system_fonts=True
        )
        with Image.open(io.BytesIO(data)) as opened:
            pixels = numpy.asarray(opened.convert("RGB"), dtype=numpy.uint8)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"emoji: {whose}: not a drawing: {reason}") from None
    if pixels.shape != (SIZE, SIZE, 3) or pixels.min() == 255:
        raise ConfigError(f"emoji: {whose}: not a drawing: nothing of it is seen")
    return pixels


def checksum(arrays: Mapping[str, NDArray[numpy.generic]]) -> str:
    """SHA-256 of codes, labels and pixels, in the order of ``PACKAGES``."""
    codes = numpy.asarray(arrays["codes"]).tolist()
    digest = hashlib.sha256("\n".join(codes).encode())
    for name in ("labels", *(package.group for package in PACKAGES)):
        array = numpy.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _about() -> str:
    """Where the pictures come from."""
    from importlib.metadata import version

    packages = {package.requirement: package.licence for package in PACKAGES}
    return json.dumps({"drawings": packages, "renderer": f"resvg_py {version('resvg_py')}"})


def _size(icons: Table) -> Table:
    """What an archive says of all its drawings; 16 is Iconify's."""
    return {side: icons.get(side, 16) for side in ("width", "height")}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file.read()
