"""The file by which a node's trainer is found."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import NamedTemporaryFile

from fedlora.errors import ConfigError, FedloraError, wrong


@dataclass(frozen=True)
class Named:
    """Where a trainer is.

    Attributes:
        address: host and port of its Ray.
        namespace, name: the actor's, in that Ray.
        token: what its Ray asks of whoever joins; empty where the user's own settings say.
    """

    address: str
    namespace: str
    name: str
    token: str = ""


def read(path: Path) -> Named:
    """What a trainer's file says.

    Raises:
        ConfigError: there is no such file, or it is not a trainer's.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise wrong("trainer", str(path), f"{_file()} ({reason})") from None
    known = {field.name for field in fields(Named)}
    if not isinstance(table, dict) or not {"address", "namespace", "name"} <= table.keys() <= known:
        raise wrong("trainer", str(path), f"{_file()} (it holds no address, namespace and name)")
    if not all(isinstance(value, str) for value in table.values()):
        raise wrong("trainer", str(path), f"{_file()} (its values are no texts)")
    return Named(**table)


def _file() -> str:
    """What every refusal asks for."""
    return "the file of a running 'fedlora node'"


def write(path: Path, named: Named) -> None:
    """Put the file in its place, whole; only its owner may read it, since it holds the token.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps(asdict(named), indent=2) + "\n"
    try:
        with NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise unusable(path, error) from None


def unusable(path: Path, error: OSError) -> ConfigError:
    """The one line about a file that cannot be."""
    return wrong("--state", str(path), f"a file that can be written ({error.strerror})")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Be the one process that keeps the trainer of this file, known by its number.

    Raises:
        ConfigError: there is one already, or the folder cannot be written.
    """
    lock = _lock(path)
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise unusable(path, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            allowed = f"another file, or first: fedlora node --stop --state {path}"
            raise ConfigError(
                f"--state: found {str(path)!r}, whose trainer process {keeper(path)} keeps, "
                f"allowed: {allowed}"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def keeper(path: Path) -> int | None:
    """The number of the process that keeps the trainer of this file; None if none does.

    Raises:
        FedloraError: the file that would say so cannot be read.
    """
    try:
        descriptor = os.open(_lock(path), os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FedloraError(f"--state: {_lock(path)}: {error.strerror}") from None
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        return int(os.read(descriptor, 32) or b"0") or None
    finally:
        os.close(descriptor)


def _lock(path: Path) -> Path:
    """The file that is locked while a process keeps the trainer."""
    return path.with_name(f"{path.name}.lock")
