"""Files that cannot be written: one line that says which, why, and how much room there is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedlora.errors import FedloraError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For as long as ``path``, a file or a folder, is written.

    Raises:
        FedloraError: it cannot be; what was written before is left as it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise FedloraError(
            f"{path}: cannot be written ({reason}); {_free(path)} bytes are free there"
        ) from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` when all of it is there.

    Raises:
        FedloraError: it cannot be written; what was at ``path`` is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        shutil.rmtree(beside, ignore_errors=True)  # of a process that died
        beside.mkdir(parents=True)
    try:
        yield beside
        with writing(path):
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _free(path: Path) -> int:
    """Bytes of room on the disk that holds a path, or would."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free
