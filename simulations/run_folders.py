"""Read finished runs back from their folders."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError

KEPT = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """One run folder. The dictionaries are JSON and TOML as written (hence Any)."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)  # empty where nothing tells it
    privacy: dict[str, Any] = field(default_factory=dict)  # the statement of a private run

    @property
    def seed(self) -> int:
        """The run's root seed."""
        return int(self.config.get("seed", 0))

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last round."""
        return self.rounds[-1]

    @property
    def language(self) -> bool:
        """Whether its score is perplexity."""
        return any(record.get("perplexity") is not None for record in self.rounds)

    def values(self, name: str) -> list[float | None]:
        """One number of every round; ``mean`` and ``worst`` are over the groups."""
        return [pick(record, name) for record in self.rounds]


def is_run(folder: Path) -> bool:
    """Whether a folder is recognised as that of one run."""
    return (folder / "config.toml").is_file() and (folder / "rounds.jsonl").is_file()


def read_run(folder: Path) -> Run:
    """Read one run folder; an unfinished run has no summary.

    Raises:
        ConfigError: a file is missing or broken; it is named, with the line.
    """
    if not is_run(folder):
        raise ConfigError(f"{folder}: not a run folder, it needs config.toml and rounds.jsonl")
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{folder / 'config.toml'}: {error}") from None
    return Run(
        folder=folder,
        config=config,
        rounds=_read_rounds(folder / "rounds.jsonl"),
        summary=_beside(folder / "summary.json"),
        environment=_beside(folder / "environment.json"),
        privacy=_beside(folder / "privacy.json"),
    )


def keep(runs: Iterable[Run], path: Path) -> Path:
    """Write what tables and figures need of the runs, a line each, for ``collect`` to read."""
    lines = [
        json.dumps(
            {
                "name": run.folder.name,
                "config": run.config,
                "rounds": run.rounds,
                **({"environment": run.environment} if run.environment else {}),
                **({"privacy": _but_clients(run.privacy)} if run.privacy else {}),
            }
        )
        for run in runs
    ]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _but_clients(statement: dict[str, Any]) -> dict[str, Any]:
    """A statement without its line for each client."""
    return {key: value for key, value in statement.items() if key != "clients"}


def _kept(path: Path) -> dict[Path, Run]:
    """The runs of a file that ``keep`` wrote."""
    runs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        record = _record(line, where)
        config, rounds = record.get("config"), record.get("rounds")
        if not isinstance(config, dict) or not isinstance(rounds, list) or not rounds:
            raise ConfigError(f"{where}: no run; found the keys {', '.join(record)}")
        told = [record.get(key) for key in ("environment", "privacy")]
        environment, privacy = (one if isinstance(one, dict) else {} for one in told)
        place = path / str(number)
        runs[place] = Run(place, config, rounds, {}, environment, privacy)
    return runs


def collect(folders: Iterable[Path]) -> list[Run]:
    """The runs in run folders, and in folders of run folders, in the order of their names.

    A folder without any may hold the ``runs.jsonl`` of an earlier report.

    Raises:
        ConfigError: a folder is none of these, or one of its runs cannot be read.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [folder] if is_run(folder) else [child for child in inside if is_run(child)]
        if not found and (folder / KEPT).is_file():
            runs |= _kept((folder / KEPT).resolve())
        elif not found:
            raise ConfigError(
                f"{folder}: neither a run folder (config.toml and rounds.jsonl) "
                f"nor a folder that holds some, or their {KEPT}"
            )
        runs |= {path.resolve(): read_run(path) for path in found}
    return list(runs.values())


def pick(record: dict[str, Any], name: str) -> float | None:
    """A number of one round; ``mean`` and ``worst`` are over the groups' accuracies."""
    groups = [float(value) for value in record.get("groups", {}).values()]
    if name in ("mean", "worst"):
        if not groups:
            return _number(record.get("accuracy"))
        return statistics.fmean(groups) if name == "mean" else min(groups)
    return _number(record.get(name))


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    """The records of ``rounds.jsonl``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rounds = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    for number, record in enumerate(rounds, 1):
        if not isinstance(record.get("round"), int):
            raise ConfigError(f"{path}, line {number}: no whole number under 'round'")
    if not rounds:
        raise ConfigError(f"{path}: empty, the run was stopped before round 0 was measured")
    return rounds


def _beside(path: Path) -> dict[str, Any]:
    """A JSON object that a run folder may have."""
    return _record(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _record(text: str, where: str) -> dict[str, Any]:
    """One JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {value!r}, allowed: a JSON object")
    return value


def _number(value: object) -> float | None:
    """A float, or None for what was not measured."""
    return float(value) if isinstance(value, int | float) else None
