"""Flower's deployment on the loopback of this machine, to measure and to test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.errors import ConfigError, FedloraError

PATIENCE = 120.0  # seconds for a part of it to start
BUNDLE = """\
[project]
name = "{name}"
version = "0.1.0"
dependencies = ["flwr[simulation]>=1.41,<2"]
license = {{ file = "LICENSE" }}

[tool.flwr.app]
publisher = "fedlora"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
told = ""
"""


@dataclass
class Loopback:
    """A SuperLink with its SuperNodes and their trainers, under one folder.

    Attributes:
        folder: a Flower home of its own, logs, state files.
        processes: by name.
    """

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    link: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What every process gets."""
        beside = Path(sys.executable).parent
        return {
            **os.environ,
            "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *command: str) -> None:
        """Start a process of this deployment, in a group of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def superlink(self) -> None:
        """Start the SuperLink, and write down where it is for Flower's command line.

        Raises:
            FedloraError: it does not start.
        """
        (port,) = free_ports(1)
        self.link = f"127.0.0.1:{port}"
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.link}"\n'
            "insecure = true\n",
            encoding="utf-8",
        )
        where = ("--host", "127.0.0.1", "--port", str(port))
        self.start("superlink", "flower-superlink", "--insecure", *where)
        self.until("superlink", lambda: _open(self.link))

    def trainer(self, name: str, threads: int = 1) -> Path:
        """Start ``fedlora node`` and wait until it is ready; its state file.

        Raises:
            FedloraError: it does not start.
        """
        state = self.folder / f"{name}.json"
        words = ("node", "--state", str(state), "--threads", str(threads))
        self.start(name, sys.executable, "-m", "simulations.cli", *words)
        self.until(name, state.exists)
        return state

    def supernode(self, name: str, config: Mapping[str, str | int]) -> None:
        """Start a SuperNode with its configuration."""
        (port,) = free_ports(1)
        pairs = [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in config.items()]
        self.start(
            name,
            *("flower-supernode", "--insecure", "--superlink", self.link, "--port", str(port)),
            *("--node-config", " ".join(pairs)),
        )

    def bundle(self, name: str, server: str, client: str) -> Path:
        """A Flower app that only says which of the installed apps it is."""
        folder = self.folder / name
        folder.mkdir()
        text = BUNDLE.format(name=name, server=server, client=client)
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
        (folder / "LICENSE").write_text("Apache-2.0\n", encoding="utf-8")
        return folder

    def submit(self, app: Path, told: Sequence[str]) -> str:
        """Run an app to its end; what Flower's command line said. ``told`` is its run config."""
        command = ["flwr", "run", str(app), "here", "--stream", "--run-config", " ".join(told)]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    def until(self, name: str, done: Callable[[], bool]) -> None:
        """Wait for something that a process does at its start.

        Raises:
            FedloraError: it ends, or takes too long.
        """
        end = time.monotonic() + PATIENCE
        while not done():
            if self.processes[name].poll() is not None or time.monotonic() > end:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise FedloraError(f"{name} did not start: {' '.join(log.split())[-300:]}")
            time.sleep(0.1)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a process, and whatever of its group is left."""
        process = self.processes.pop(name)
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """A deployment whose SuperLink runs; all of it ends with the context.

    Raises:
        ConfigError: Flower's commands are not here.
        FedloraError: the SuperLink does not start.
    """
    here = Loopback(folder)
    if shutil.which("flower-superlink", path=here.environment["PATH"]) is None:
        raise ConfigError("deployment: found no flower-superlink, allowed: with flwr installed")
    try:
        here.superlink()
        yield here
    finally:
        for name in list(here.processes)[::-1]:
            here.end(name)


def free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody listens at."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _open(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
