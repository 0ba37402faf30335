"""A SuperLink and two SuperNodes on this machine, with TLS and node keys, on a real MiniLM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from simulations import launch
from simulations.deploy.certificates import issue
from simulations.deploy.checks import connect, missing_nodes
from simulations.deploy.layout import Place
from simulations.progress import Progress
from simulations.recipe import load
from tests.simulations.deployed import deployment

pytestmark = pytest.mark.deploy
SETTINGS = ["model.name=minilm", "clients.number=2", "launch.pack=1", "task.rows_per_group=20"]
OPTIONS = [word for setting in SETTINGS for word in ("--set", setting)]
PATIENCE = 900.0  # seconds, on a busy machine


class Lab:
    """A deployment whose parts are started by their scripts, each with its descendants."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, part: str) -> None:
        with (self.place.folder / f"{part}.log").open("ab") as log:
            command = [self.place.folder / part / "start"]
            self.running[part] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment
            )

    def kill(self, part: str) -> None:
        """As a machine that loses its power: the program and all that it started."""
        started = self.running.pop(part)
        for process in [*psutil.Process(started.pid).children(recursive=True), started]:
            process.send_signal(signal.SIGKILL)
        started.wait()

    def command(self, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["fedlora", "deploy", *map(str, words)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submitted(self, *words: object) -> subprocess.Popen[str]:
        return self.command("run", self.place.folder, "tiny", *OPTIONS, *words)

    def log(self, part: str) -> str:
        return (self.place.folder / f"{part}.log").read_text(errors="replace")


@contextmanager
def started(folder: Path) -> Iterator[Lab]:
    lab = Lab(deployment(folder))
    try:
        for part in ("superlink", "node-0", "node-1"):
            lab.start(part)
            if part == "superlink":
                until(lambda: "registered 2 keys" in lab.log("superlink"))
        until(lambda: not missing_nodes(lab.place))
        yield lab
    finally:
        for part in list(lab.running):
            lab.kill(part)
        for process in psutil.process_iter(["cmdline"]):  # what outlived its parent
            if any(str(folder) in word for word in process.info["cmdline"] or []):
                process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with started(tmp_path_factory.mktemp("deployed") / "lab") as running:
        yield running


def until(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.1)


def rounds(folder: Path) -> list[dict[str, object]]:
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def done(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_a_killed_superlink_costs_nothing_and_results_are_the_simulations(
    lab: Lab, tmp_path: Path
) -> None:
    """Two rounds, the SuperLink killed after the first: the same adapter bit for bit."""
    folder = tmp_path / "run"
    submitted = lab.submitted("--rounds=2", "--out", folder)
    assert submitted.stderr
    streamed = iter(submitted.stderr.readline, "")
    assert any("round 1/2" in line for line in streamed)  # told once it is committed
    lab.kill("superlink")
    code, _, err = done(submitted)
    assert code == 2
    last = err.splitlines()[-1]
    assert "stopped answering" in last
    assert f"fedlora deploy run DIR RECIPE --resume {folder}" in last
    assert not (folder / "summary.json").exists()

    lab.start("superlink")
    until(lambda: connect(lab.place)[0])
    code, out, err = done(lab.submitted("--rounds=2", "--resume", folder, "--wait=120", "--json"))
    assert code == 0, err
    assert "goes on after round 1" in err
    assert json.loads(out)["folder"] == str(folder)
    here = launch.run(
        load("tiny").resolve(None, [*SETTINGS, "rounds=2"]), tmp_path / "here", Progress()
    )
    assert len(rounds(folder)) == 3
    for ours, simulated in zip(rounds(folder), rounds(here), strict=True):
        del ours["seconds"], simulated["seconds"]
        assert ours == simulated
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (here / adapter).read_bytes()


def test_a_node_that_dies_in_a_round_is_named_and_comes_back(lab: Lab, tmp_path: Path) -> None:
    """And results come to a machine that is not the SuperLink's."""
    folder = tmp_path / "run"
    begun = len(re.findall("Receiving: train message", lab.log("node-1")))
    elsewhere = (
        "import sys; from simulations.deploy import submitting; "
        "submitting.is_here = lambda host: False; "
        "from simulations.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["deploy", "run", lab.place.folder, "tiny", *OPTIONS, "--rounds=1", "--out", folder]
    words += ["--set", "clients.min_train_nodes=1", "--wait", "600"]
    submitted = subprocess.Popen(
        [sys.executable, "-c", elsewhere, *map(str, words)],
        env=lab.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: len(re.findall("Receiving: train message", lab.log("node-1"))) > begun)
    lab.kill("node-1")
    lab.start("node-1")
    code, _, err = done(submitted)
    assert code == 0, err
    last = rounds(folder)[-1]
    assert last["merged"]
    lost = [failure for failure in last["failures"] if failure["stage"] == "train"]  # type: ignore[attr-defined]
    assert len(lost) == 1, last["failures"]
    assert lost[0]["reason"].startswith("no reply: "), lost
    assert len(last["clients"]) == 1  # type: ignore[arg-type]
    assert (folder / "adapter/adapter_model.safetensors").stat().st_size > 10_000
    there = lab.place.superlink / "runs" / folder.name
    for path in there.rglob("*.*"):
        assert (folder / path.relative_to(there)).read_bytes() == path.read_bytes()


def test_refusals_come_in_one_line(lab: Lab, tmp_path: Path) -> None:
    """A key that is not registered, another CA, and a SuperLink in the clear."""
    node = lab.place.node(0)
    stranger = deployment(tmp_path / "stranger")
    parts = {}
    for name in ("unregistered", "other-ca"):
        parts[name] = tmp_path / name
        parts[name].mkdir()
        for path in node.iterdir():
            if path.is_file():
                (parts[name] / path.name).write_bytes(path.read_bytes())
                (parts[name] / path.name).chmod(path.stat().st_mode)
        text = (parts[name] / "deployment.toml").read_text()
        taken, free = lab.place.deployment.ports[0], stranger.deployment.ports[0]
        (parts[name] / "deployment.toml").write_text(text.replace(str(taken), str(free)))
    (parts["unregistered"] / "node.key").write_bytes((stranger.node(0) / "node.key").read_bytes())
    (parts["other-ca"] / "ca.crt").write_bytes(issue(["127.0.0.1"], 30)[0].public)
    allowed = {"unregistered": "not registered", "other-ca": "certificate of another CA"}
    for name, said in allowed.items():
        refused = subprocess.run(
            [parts[name] / "start"],
            env=lab.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert refused.returncode == 1
        assert re.fullmatch(f"fedlora: [^\n]*{said}[^\n]*\n", refused.stderr), refused.stderr

    port = str(stranger.deployment.port)
    words = ["flower-superlink", "--insecure", "--isolation=process", "--host=127.0.0.1"]
    clear = subprocess.Popen(
        [*words, f"--port={port}"],
        env={**lab.environment, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _listens(int(port)))
        refused = subprocess.run(
            [stranger.node(0) / "start"],
            env=lab.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    finally:
        clear.kill()
        clear.wait()
    assert refused.returncode == 1
    said = "found plaintext, without TLS"
    assert re.fullmatch(f"fedlora: [^\n]*{said}[^\n]*\n", refused.stderr), refused.stderr


def test_all_nodes_are_asked_for_before_a_run_begins(lab: Lab, tmp_path: Path) -> None:
    lab.running["node-1"].send_signal(signal.SIGTERM)
    lab.running.pop("node-1").wait()
    until(lambda: bool(missing_nodes(lab.place)))
    code, _, err = done(lab.submitted("--wait=1", "--out", tmp_path / "run"))
    assert code == 2
    (line,) = err.splitlines()
    assert "node 1: found offline, allowed: online (node-1/start); waited 1 s (--wait)" in line


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True
