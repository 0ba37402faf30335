"""The errors a user can meet, and the one-line form they take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class FedloraError(Exception):
    """Something a person can put right; the command line prints it in one line and exits 2."""


class ConfigError(FedloraError):
    """A recipe, an option or a command that cannot be carried out as written."""


class DataError(ConfigError):
    """Rows that cannot be read, in words that stay where the rows are.

    Attributes:
        place: of what is wrong in its file, such as ``line 3``; empty where it is no row.
    """

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = place

    def told(self, client: int) -> str:
        """What others may know of it: whose rows they are, and the place."""
        at = f" ({self.place})" if self.place else ""
        return f"client {client}: its rows cannot be read{at}; its own log says what is wrong"


class MissingDataError(ConfigError):
    """A data set that is not on this machine and could not be fetched."""


class WireError(FedloraError):
    """A record from the network that is not what this round asked for."""


class PrivacyError(FedloraError):
    """A privacy claim that cannot be kept."""


class MemoryLimitError(FedloraError):
    """Training that needs more memory than its device has; a smaller pack may fit."""


def wrong(where: str, found: object, allowed: str) -> ConfigError:
    """A ``ConfigError`` saying where, what was found and what is allowed."""
    return ConfigError(f"{where}: found {found!r}, allowed: {allowed}")


def unknown(where: str, found: str, allowed: Iterable[str]) -> ConfigError:
    """A ``ConfigError`` for a name that is not in a list, with the nearest one that is."""
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"{where}: found {found!r}, allowed: {', '.join(names)}{hint}")


def choose(table: Mapping[str, T], name: str, where: str) -> T:
    """The entry ``name`` of a table.

    Raises:
        ConfigError: the table has no such entry; the nearest name is given.
    """
    if name not in table:
        raise unknown(where, name, table)
    return table[name]
