"""Rounds put on disk so that a run that dies goes on as if it had not.

A commit is two files in ``checkpoint``: tensors (safetensors), then a manifest (JSON) with the
sha256 of the tensors and of ``rounds.jsonl`` as far as it had come. Whatever else is in the folder
was never committed. The two latest commits are kept, and all go when the run is finished.

They hold what clients keep for themselves, so like ledgers they are not for release.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from safetensors.torch import load, save
from torch import Tensor

from fedlora.disk import writing
from fedlora.durable import sync_folder, unwritten, write_whole
from fedlora.errors import ConfigError, PrivacyError
from fedlora.faults import reach
from fedlora.ledger import Ledger
from simulations import client_states
from simulations.results import RunFolder, Written
from strategies.snapshot import CARRIED, Snapshot

FOLDER, SCHEMA, KEPT = "checkpoint", 1, 2
ADAPTER, STATE = "adapter", "state"  # first parts of tensors' names, beside those of ``CARRIED``
Table = dict[str, Any]  # Any: JSON values of several kinds


class Torn(Exception):  # noqa: N818 (the commit before is used)
    """A commit that is not as it was written; the message names the file."""


@dataclass(frozen=True)
class Commit:
    """A round that was committed.

    Attributes:
        snapshot: of the strategy.
        written: how far ``rounds.jsonl`` had come.
        base: the fingerprint of the frozen base.
    """

    snapshot: Snapshot
    written: Written
    base: str
    _ledger: Mapping[str, int]
    _states: tuple[Mapping[str, Tensor], Table]

    def check(self, base: str, ledger: Ledger) -> None:
        """Make sure that the run meets the same base, and a ledger that has forgotten nothing.

        Raises:
            ConfigError: another base.
            PrivacyError: a ledger's file is gone or shorter than it was.
        """
        if base != self.base:
            raise ConfigError(
                f"model: found base {base}, allowed: {self.base}, with which the run began"
            )
        there = sizes(ledger)
        for name, size in self._ledger.items():
            if there.get(name, 0) < size:
                raise PrivacyError(
                    f"{ledger.folder / name}: found {there.get(name, 0)} bytes, and round "
                    f"{self.snapshot.round} left {size}; what was spent is unknown, so restore "
                    "the file from a copy"
                )

    def give_back(self, contexts: Mapping[int, Context]) -> None:
        """Give clients what they had kept."""
        client_states.put_back(contexts, *self._states)


class Commits:
    """The commits of one run."""

    def __init__(self, results: RunFolder, base: str, ledger: Ledger) -> None:
        """``base``: the fingerprint of the frozen base."""
        self._results, self._base, self._ledger = results, base, ledger
        self._folder = results.path / FOLDER
        self._config = _hash((results.path / "config.toml").read_bytes())

    def add(self, snapshot: Snapshot, contexts: Mapping[int, Context]) -> None:
        """Commit a round; when this returns, it is on disk.

        Raises:
            FedloraError: it cannot be written; the commits before it stand.
        """
        name = f"round-{snapshot.round:06d}"
        manifest = self._folder / f"{name}.json"
        tensors, notes = _told(snapshot, contexts)
        data = save(tensors)
        try:
            first = not self._folder.is_dir()
            self._folder.mkdir(exist_ok=True)
            written = self._results.sync()
            body = {
                "schema": SCHEMA,
                "round": snapshot.round,
                "base": self._base,
                "config": self._config,
                "rounds": [written.size, written.sha256],
                "tensors": [len(data), _hash(data)],
                "ledger": sizes(self._ledger),
                **notes,
            }
            text = json.dumps({"sha256": _hash(_text(body)), **body}).encode()
            write_whole(manifest.with_suffix(".safetensors"), data, "data")
            write_whole(manifest, text, "manifest")
            sync_folder(self._folder)
            if first:  # the names of the folder and of what lies beside it
                sync_folder(self._results.path)
                sync_folder(self._results.path.parent)
        except OSError as error:
            raise unwritten(manifest, len(data), error) from None
        with writing(self._folder):
            self._drop_old(snapshot.round)
        reach("after-commit")

    def remove(self) -> None:
        """Take all commits away: the run is finished.

        Raises:
            FedloraError: they cannot be.
        """
        drop(self._folder)

    def _drop_old(self, latest: int) -> None:
        """Keep the latest commits, and nothing of a round after them."""
        manifests = sorted(self._folder.glob("round-*.json"))
        for path in manifests:
            if path.stem > f"round-{latest:06d}":  # torn, and its round was done again
                path.unlink()
        for path in [path for path in manifests if path.exists()][:-KEPT]:
            path.unlink()
        for path in self._folder.glob("round-*.safetensors"):
            if not path.with_suffix(".json").exists():
                path.unlink()


def drop(folder: Path) -> None:
    """Take a folder of commits away, if it is there.

    Raises:
        FedloraError: it cannot be.
    """
    if folder.is_dir():
        with writing(folder):
            shutil.rmtree(folder)


def latest(folder: Path, tell: Callable[[str], None]) -> Commit | None:
    """A run's last whole commit, or None if it has none yet; ``tell`` hears of the others.

    Raises:
        ConfigError: all commits are torn, or the recipe beside them is another one.
    """
    found = sorted((folder / FOLDER).glob("round-*.json"), reverse=True)
    for path in found:
        try:
            return _read(path, folder)
        except Torn as torn:
            tell(f"{torn}, so this commit of {path.stem} is left out")
    if found:
        raise ConfigError(
            f"{folder}: found {len(found)} commits and none whole, allowed: at least one; "
            "start the run again in another folder"
        )
    return None


def sizes(ledger: Ledger) -> dict[str, int]:
    """How long each file of a ledger is; nothing is ever taken out of one."""
    return {path.name: path.stat().st_size for path in sorted(ledger.folder.glob("*.jsonl"))}


def _told(snapshot: Snapshot, contexts: Mapping[int, Context]) -> tuple[dict[str, Tensor], Table]:
    """All of a commit: tensors by name, each with storage of its own, and the rest as JSON."""
    states, kept = client_states.taken(contexts)
    carried = {  # which may share storage, as a file's tensors may not
        name: {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in found.items()
        }
        for name, found in snapshot.carried.items()
    }
    groups = {ADAPTER: snapshot.arrays, **carried, STATE: states}
    tensors = {
        f"{group}/{key}": tensor.contiguous()
        for group, found in groups.items()
        for key, tensor in found.items()
    }
    notes = {
        "names": list(tensors),  # safetensors keeps no order
        "clients": {str(node): client for node, client in snapshot.clients.items()},
        "bound": snapshot.bound,
        "states": kept,
    }
    return tensors, notes


def _read(path: Path, folder: Path) -> Commit:
    """A commit by its manifest.

    Raises:
        Torn: one of its files is not as it was written.
        ConfigError: the recipe is another one, or the commit is of another version's making.
    """
    body = _manifest(path)
    if body.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {body.get('schema')!r}, this version reads {SCHEMA}")
    if body["config"] != _hash((folder / "config.toml").read_bytes()):
        raise ConfigError(
            f"{folder / 'config.toml'}: found another file than the run began with; "
            "put it back as it was, or start another run"
        )
    written = Written(*body["rounds"])
    _bytes(folder / "rounds.jsonl", *body["rounds"])
    data = _bytes(path.with_suffix(".safetensors"), *body["tensors"])
    tensors = load(data)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in (ADAPTER, STATE, *CARRIED)}
    for name in body["names"]:
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = tensors[name]
    snapshot = Snapshot(
        body["round"],
        groups[ADAPTER],
        {name: groups[name] for name in CARRIED},
        {int(node): client for node, client in body["clients"].items()},
        body["bound"],
    )
    return Commit(snapshot, written, body["base"], body["ledger"], (groups[STATE], body["states"]))


def _manifest(path: Path) -> Table:
    """What a manifest says, without its own hash."""
    try:
        found: object = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Torn(f"{path}: cannot be read ({type(error).__name__})") from None
    told = found.pop("sha256", None) if isinstance(found, dict) else None
    if not isinstance(found, dict) or told != _hash(_text(found)):
        raise Torn(f"{path}: its sha256 is not that of its lines")
    return found


def _bytes(path: Path, size: int, sha256: str) -> bytes:
    """The first ``size`` bytes of a file, which must hash to ``sha256``."""
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise Torn(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise Torn(f"{path}: found {len(data)} bytes of {size}")
    if _hash(data) != sha256:
        raise Torn(f"{path}: its sha256 is not the manifest's")
    return data


def _text(body: Table) -> bytes:
    """A manifest's contents in one way of writing."""
    return json.dumps(body, sort_keys=True).encode()


def _hash(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
