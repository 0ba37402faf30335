"""Whether two processes run the same Fedlora."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fedlora.errors import wrong

PACKAGES = ("fedlora", "clients")  # what a client's update depends on
ROOT = Path(__file__).parent.parent.parent


@cache
def sums() -> Mapping[str, str]:
    """The sha256 of each source file that this process's client app can import, by its path."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def check_same(app: Mapping[str, str]) -> None:
    """Hold an app's sources against those of this process.

    An app may have fewer of them: Flower's bundle leaves out what no app imports.

    Raises:
        ConfigError: the first file that differs, or is not here.
    """
    here = sums()
    for path, found in app.items():
        if here.get(path) != found:
            allowed = f"{here[path][:10]}, the node's" if path in here else "no such file"
            what = f"trainer: the app's source {path}"
            raise wrong(what, found[:10], f"{allowed}; install the same Fedlora on all machines")
