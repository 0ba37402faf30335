"""Going on with a run that was stopped or killed, as if nothing had happened."""

from __future__ import annotations

import fcntl
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.serverapp import Grid

from fedlora.config import PLACES, RunConfig
from fedlora.disk import writing
from fedlora.errors import ConfigError, wrong
from fedlora.ledger import Ledger
from simulations.commits import FOLDER, Commit, Commits, drop, latest
from simulations.grid import LocalGrid
from simulations.recipe import Recipe, load
from simulations.results import RunFolder
from strategies.snapshot import Snapshot

CHANGEABLE = {
    "name",
    "launch.track",
    *(f"launch.{key}" for key in PLACES),
}  # say nothing of what is computed


def config_of(
    folder: Path, recipe: str | None, method: str | None, changes: Sequence[str]
) -> RunConfig:
    """The configuration of the run in a folder; the recipe and the changes may only say the same.

    But they may say that clients run elsewhere.

    Raises:
        ConfigError: there is no run, or another one was asked for.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(f"--resume: found no run in {str(folder)!r}: it has no config.toml")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    began = Recipe(str(table.get("name", "run")), "", table)
    config = began.resolve()
    asked = (load(recipe) if recipe else began).resolve(method, changes)
    same_run(folder, config, asked)
    return config.model_copy(update={"launch": asked.launch})


def same_run_in(folder: Path, asked: RunConfig) -> None:
    """As ``same_run``, of the run that a folder holds."""
    same_run(folder, config_of(folder, None, None, []), asked)


def same_run(folder: Path, began: RunConfig, asked: RunConfig) -> None:
    """Refuse to go on with a run under another configuration.

    Raises:
        ConfigError: the first key that differs.
    """
    before, now = flat(began.model_dump()), flat(asked.model_dump())
    for key in sorted(before.keys() | now.keys()):
        same = before.get(key) == now.get(key)
        if not same and ".".join(key.split(".")[:2]) not in CHANGEABLE:
            allowed = f"{before.get(key)!r}, with which the run in {folder} began"
            raise wrong(key, now.get(key), allowed)


State = Literal["new", "begun", "finished"]


def state_of(folder: Path, config: RunConfig) -> State:
    """How far the run in a folder has come; ``new`` where nothing is but what a start leaves.

    Raises:
        ConfigError: the run in it is another one, or the folder is no run's.
    """
    found = list(folder.iterdir()) if folder.is_dir() else []
    if all(path.name == ".claim" or path.match(".*.part") for path in found):
        with writing(folder):
            for path in found:
                path.unlink()
        return "new"
    same_run_in(folder, config)
    return "finished" if finished(folder) else "begun"


def finished(folder: Path) -> bool:
    """Whether a run is finished; commits that it died over taking away are taken away."""
    if not (folder / "summary.json").is_file():
        return False
    drop(folder / FOLDER)
    return True


class Resumable:
    """The folder of a run that is being run, and its commits, if it makes any."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        base: str,
        ledger: Ledger,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Make the folder; or, with ``tell``, go on in it and tell of whatever is odd.

        ``base`` is the fingerprint of the frozen base.

        Raises:
            ConfigError: see ``RunFolder`` and ``commits.latest``, or another base is here.
            PrivacyError: the ledger has forgotten a charge.
        """
        self._every, self._commit = config.launch.checkpoint, None
        if tell is None:
            self.results = RunFolder(folder, config)
        else:
            self._commit = latest(folder, tell)
            if self._commit:
                self._commit.check(base, ledger)
            self.results = _reopened(folder, config, self._commit, tell)
        self._commits = Commits(self.results, base, ledger)

    def restore(self, grid: Grid) -> Snapshot | None:
        """What the strategy goes on from; clients get back what they had kept."""
        if self._commit is None:
            return None
        self._commit.give_back(contexts(grid))
        return self._commit.snapshot

    def add(self, snapshot: Snapshot, grid: Grid) -> None:
        """Commit a round, if it is one that is committed."""
        if self._every and snapshot.round % self._every == 0:
            self._commits.add(snapshot, contexts(grid))

    def finish(self, extra: dict[str, Any]) -> None:  # Any: JSON values of several kinds
        """Write the summary, which ends the run, and drop the commits."""
        self.results.finish(extra)
        self._commits.remove()


@contextmanager
def alone(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from running the run in a folder meanwhile.

    Raises:
        ConfigError: one does already, and still after ``patience`` seconds.
    """
    descriptor, ends = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= ends:
                    raise ConfigError(f"{folder}: another process runs this run now") from None
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _reopened(
    folder: Path, config: RunConfig, commit: Commit | None, tell: Callable[[str], None]
) -> RunFolder:
    """The folder of results as it was at a commit, or empty of records without one."""
    after = commit.snapshot.round if commit else None
    where = "from the start, nothing is committed" if after is None else f"after round {after}"
    tell(f"{folder}: goes on {where}")
    results = RunFolder.reopened(folder, config, commit.written if commit else None)
    if changed := results.resumed(after):
        tell(f"{folder}: {changed}; what follows may differ from a run that was not stopped")
    return results


def contexts(grid: Grid) -> Mapping[int, Context]:
    """The clients' contexts, where they are here."""
    return grid.contexts if isinstance(grid, LocalGrid) else {}


def flat(table: Mapping[str, Any], above: str = "") -> dict[str, object]:
    """Dotted keys of a table of tables, and their values."""
    found: dict[str, object] = {}
    for key, value in table.items():
        inside = flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        found |= inside
    return found
