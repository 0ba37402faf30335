"""A run's folder: what is written, when, and so that it can be read again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedlora.config import RunConfig
from fedlora.disk import writing
from fedlora.durable import sync_folder, sync_tree, unwritten, write_whole
from fedlora.errors import ConfigError
from fedlora.faults import reach
from fedlora.rounds import RoundRecord

TRACK = "track"  # a folder for trackers' files, in a run's folder and no part of its result
PACKAGES = ("fedlora", "flwr", "torch", "transformers", "peft", "opacus", "ray", "numpy")


@dataclass(frozen=True)
class Written:
    """How far ``rounds.jsonl`` has come: bytes, and their sha256."""

    size: int
    sha256: str


class RunFolder:
    """One run's results as they come."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Make the folder, and write the resolved recipe and the environment into it.

        Raises:
            ConfigError: the folder holds something already, or cannot be written.
        """
        claim(path)
        self._begin(path, config)
        self._write("config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
        self.write("environment.json", environment(config.launch.threads))

    @classmethod
    def reopened(cls, path: Path, config: RunConfig, written: Written | None) -> RunFolder:
        """An unfinished run's folder; of ``rounds.jsonl`` only what was ``written`` stays.

        Raises:
            ConfigError: a line of it cannot be read.
        """
        folder = cls.__new__(cls)
        folder._begin(path, config)
        lines = path / "rounds.jsonl"
        data = lines.read_bytes()[: written.size] if written else b""
        for number, line in enumerate(data.splitlines(), 1):
            try:
                folder.records.append(RoundRecord.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{lines}, line {number}: no record ({error})") from None
        if lines.exists():
            with writing(lines):
                os.truncate(lines, len(data))
        folder._size = len(data)
        folder._sha256.update(data)
        return folder

    def _begin(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.records: list[RoundRecord] = []
        self._size, self._sha256 = 0, hashlib.sha256()

    def add(self, record: RoundRecord) -> None:
        """Append one round's line.

        Raises:
            FedloraError: it cannot be written.
        """
        self.records.append(record)
        line = (json.dumps(record.as_json()) + "\n").encode()
        path, half = self.path / "rounds.jsonl", len(line) // 2
        try:
            with path.open("ab") as file:
                file.write(line[:half])
                file.flush()
                reach("mid-record")
                file.write(line[half:])
        except OSError as error:
            raise unwritten(path, len(line), error) from None
        self._size += len(line)
        self._sha256.update(line)
        reach("after-record")

    def sync(self) -> Written:
        """Put ``rounds.jsonl`` on disk; how far it has come."""
        with (self.path / "rounds.jsonl").open("ab") as file:
            os.fsync(file.fileno())
        return Written(self._size, self._sha256.hexdigest())

    def resumed(self, after_round: int | None) -> str:
        """Note in ``environment.json`` where the run is taken up again, and with what.

        Returns what of it is not as it was at the start, or nothing.
        """
        path, now = self.path / "environment.json", environment(self.config.launch.threads)
        began = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
        again = [*began.get("resumed", []), {"after_round": after_round, **now}]
        self.write(path.name, {**began, "resumed": again})
        before, here = ({**found["packages"], "commit": found["commit"]} for found in (began, now))
        return ", ".join(
            f"{name} was {before.get(name)} and is {here.get(name)}"
            for name in here
            if before.get(name) != here.get(name)
        )

    def finish(self, extra: dict[str, Any]) -> None:  # Any: JSON values of several kinds
        """Write ``summary.json``: the last round, the totals, and what the caller adds."""
        last = self.records[-1]
        groups = last.groups or ({"all": last.accuracy} if last.accuracy is not None else {})
        summary = {
            "name": self.config.name,
            "method": self.config.method,
            "seed": self.config.seed,
            "rounds": last.round,
            "loss": last.loss,
            "accuracy": last.accuracy,
            "perplexity": last.perplexity,
            "perplexities": dict(last.perplexities),
            "groups": dict(groups),
            "mean_accuracy": sum(groups.values()) / len(groups) if groups else None,
            "worst_accuracy": min(groups.values()) if groups else None,
            "aggregation_error": last.aggregation_error,
            **({"own_rows": last.as_json()["own_rows"]} if last.own_rows else {}),
            "bytes_up": sum(record.bytes_up for record in self.records),
            "bytes_down": sum(record.bytes_down for record in self.records),
            "seconds": sum(record.seconds for record in self.records),
            "failures": sum(len(record.failures) for record in self.records),
            "rounds_merged": sum(record.merged for record in self.records),
            **extra,
        }
        sync_tree(self.path, but=self.path / TRACK)
        self.write("summary.json", summary)  # a folder that has it is finished
        sync_folder(self.path)

    def write(self, name: str, table: dict[str, Any]) -> None:  # Any: JSON values of several kinds
        """Write one more file, as JSON."""
        self._write(name, json.dumps(table, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Write one file whole or not at all."""
        write_whole(self.path / name, text.encode())


def claim(path: Path) -> None:
    """Make a folder that is ours alone.

    Raises:
        ConfigError: it holds something already, is a file, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigError(
                f"--out: found {str(path)!r}, which is not empty, allowed: a new or empty folder"
            )
        (path / ".claim").touch()
        (path / ".claim").unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"--out: cannot write {str(path)!r}: {reason}") from None


def default_folder(name: str) -> Path:
    """``results/runs/<name>-<time>``, numbered when two start in one second."""
    stem = Path("results") / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def environment(threads: int) -> dict[str, Any]:  # Any: JSON values of several kinds
    """Versions, commit and hardware of what runs now on so many torch threads."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": _command(sys.argv),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": threads,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(name: str) -> str | None:
    """A package's installed version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _command(argv: Sequence[str]) -> str:
    """The command line, the program by its name."""
    return " ".join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def _commit() -> str | None:
    """The commit of the checkout this runs from, with ``+`` if it was changed since."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _processor() -> str:
    """The processor's model, where the system says it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
