"""What a machine has installed that bears on results, and how two of them differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path

HOUSE = ("clients", "fedlora", "simulations", "strategies")
LIBRARIES = ("torch", "numpy", "transformers", "peft", "opacus", "flwr")
CODE = "fedlora"  # whose version says less than its files do


@lru_cache(maxsize=1)
def installed() -> Mapping[str, str]:
    """Versions of Python and the libraries, and of Fedlora a hash of its code."""
    found = {"python": platform.python_version(), CODE: code()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code() -> str:
    """Twelve digits of a hash of the Python files of our four packages, by their names."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for package in HOUSE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compared(here: Mapping[str, str], there: Mapping[str, str]) -> tuple[str, str]:
    """What another machine has in other versions: worth a word, and why it cannot be used.

    Results may differ in their last digits between versions of libraries. Between versions of
    Fedlora, one may not understand what the other sends.
    """
    other = [
        f"{name} is {there.get(name, 'missing')}, {here[name]} here"
        for name in here
        if there.get(name) != here[name]
    ]
    refused = [line for line in other if line.startswith(f"{CODE} is ")]
    if refused:
        return "", f"{', '.join(other)}; install the same Fedlora there (hash of its code)"
    return f"{', '.join(other)}; last digits may differ" if other else "", ""
