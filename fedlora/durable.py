"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fedlora.errors import FedloraError
from fedlora.faults import reach


def write_whole(path: Path, data: bytes, point: str = "") -> None:
    """Write a file beside its place, put it on disk, then give it its name.

    The new name itself is on disk once ``sync_folder`` has returned. ``point`` is the first part
    of the names of its fault points.

    Raises:
        FedloraError: it cannot be written; what had this name is still there.
    """
    beside, half = path.with_name(f".{path.name}.part"), len(data) // 2
    try:
        with beside.open("wb") as file:
            file.write(data[:half])
            if point:
                file.flush()
                reach(f"{point}-mid-write")
            file.write(data[half:])
            file.flush()
            os.fsync(file.fileno())
        if point:
            reach(f"{point}-before-rename")
        os.replace(beside, path)
        if point:
            reach(f"{point}-after-rename")
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritten(path, len(data), error) from None


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, but: Path | None = None) -> None:
    """Put everything in a folder on disk, whoever wrote it, ``but`` what one path holds."""
    for path in [*folder.rglob("*"), folder]:
        if but is None or not path.is_relative_to(but):
            sync_folder(path)


def unwritten(path: Path, size: int, error: OSError) -> FedloraError:
    """The one line about a file that cannot be written."""
    reason = error.strerror or type(error).__name__
    return FedloraError(
        f"{path}: {size} bytes could not be written ({reason}); make room, and go on with "
        "fedlora run --resume"
    )
