"""Making a deployment's folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.errors import ConfigError, wrong
from simulations.deploy import scripts
from simulations.deploy.certificates import Pair, address_of, issue, node_key
from simulations.deploy.layout import DATA, FILE, Deployment, Place
from simulations.deploy.telling import LARGEST_MEGABYTES

NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
                  r"(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")  # fmt: skip
MOST_NODES = 1000
LAST_PORT = 65535


def plan(nodes: int, hosts: Sequence[str], port: int, data: str, trainer: bool) -> Deployment:
    """A deployment as it was asked for; nodes' own ports follow the SuperLink's.

    ``hosts`` are that of the SuperLink and, if more are given, of every node; none is this machine.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    if not 1 <= nodes <= MOST_NODES:
        raise wrong("--nodes", nodes, f"1 to {MOST_NODES}")
    if not 1 <= port <= LAST_PORT - nodes:
        raise wrong("--port", port, f"1 to {LAST_PORT - nodes}, so that each node has one after it")
    for host in hosts:
        if not address_of(host) and (not NAME.fullmatch(host) or re.fullmatch(r"[\d.]+", host)):
            raise wrong("--hosts", host, "names of machines or IP addresses, without a port")
    if len(hosts) not in (0, 1, nodes + 1):
        allowed = f"the SuperLink's alone, or {nodes + 1}: the SuperLink's and each node's"
        raise wrong("--hosts", f"{len(hosts)} hosts", allowed)
    if data and (not data.startswith("/") or set(data) & set("'\"$`\\\n")):
        raise wrong("--data", data, "an absolute path on the nodes, without quotes, $ and \\")
    if data and nodes > 1 and DATA not in data and len(set(hosts[1:])) < nodes:
        raise wrong("--data", data, f"a path with {DATA}, since nodes share machines")
    first, *others = hosts or ["127.0.0.1"]
    ports = tuple(port + 1 + node for node in range(nodes))
    return Deployment(first, port, ports, tuple(others), data, trainer)


def create(folder: Path, deployment: Deployment, days: int) -> Place:
    """Write everything that a deployment needs; its certificates hold for so many days.

    The folder appears whole or not at all.

    Raises:
        ConfigError: the folder holds something, or cannot be written.
    """
    if days < 1:
        raise wrong("--days", days, "at least 1")
    where = folder.resolve()
    beside = where.with_name(f".{where.name}.part")
    try:
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            allowed = "a new or empty folder; a deployment is never written over"
            raise wrong("DIR", str(folder), allowed)
        beside.mkdir(parents=True)
        beside.chmod(0o700)
        _write_all(beside, where, deployment, days)
        if where.exists():
            where.rmdir()
        beside.rename(where)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"DIR: cannot write {str(folder)!r}: {reason}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Place(where, deployment)


def _write_all(folder: Path, final: Path, deployment: Deployment, days: int) -> None:
    """Every file of a deployment that will lie at ``final``."""
    authority, server = issue([deployment.host], days)
    environment = scripts.environment(str(Path(sys.executable).parent))
    _secret(folder / "ca.key", authority.private)
    (folder / FILE).write_text(deployment.to_toml(), encoding="utf-8")
    (folder / "README.md").write_text(scripts.readme(deployment, LARGEST_MEGABYTES), "utf-8")
    (folder / "ca.crt").write_bytes(authority.public)
    (folder / "flower").mkdir()
    flower = scripts.flower_config(deployment, str(final / "ca.crt"))
    (folder / "flower" / "config.toml").write_text(flower, encoding="utf-8")
    keys = [node_key() for _ in range(deployment.nodes)]
    starts = {"superlink": scripts.superlink_start(deployment)}
    starts |= {f"node-{k}": scripts.node_start(deployment, k) for k in range(deployment.nodes)}
    for part, start in starts.items():
        inside = folder / part
        inside.mkdir()
        own = replace(deployment, part=part)
        (inside / FILE).write_text(own.to_toml(), encoding="utf-8")
        (inside / "ca.crt").write_bytes(authority.public)
        (inside / "environment").write_text(environment, encoding="utf-8")
        (inside / f"fedlora-{part}.service").write_text(scripts.unit(part), encoding="utf-8")
        (inside / "start").write_text(start, encoding="utf-8")
        (inside / "start").chmod(0o755)
    _pair(folder / "superlink", "server.key", "server.crt", server)
    for node, key in enumerate(keys):
        _pair(folder / f"node-{node}", "node.key", "node.pub", key)
    for known in (folder / "nodes", folder / "superlink" / "nodes"):
        known.mkdir()
        for node, key in enumerate(keys):
            (known / f"{node}.pub").write_bytes(key.public)


def _pair(folder: Path, private: str, public: str, pair: Pair) -> None:
    """Write a key and what is public of it."""
    _secret(folder / private, pair.private)
    (folder / public).write_bytes(pair.public)


def _secret(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read, from the start."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
