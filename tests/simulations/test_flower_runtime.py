"""The same app under Flower's own runtime: the command of the README, once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.common.config import parse_config_args

from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load
from simulations.run_config import from_run_config
from tests.simulations.own_files import tiny_as_files

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.flower


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a Flower home and ports of its own; ends what was started in it."""
    home = tmp_path / "flower"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_ADDRESS": "local",  # else it joins whatever cluster was started last on this machine
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    yield environment
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("FLWR_HOME") == str(home):
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("sums", ["server", pytest.param("masked", marks=pytest.mark.slow)])
def test_the_readme_command_gives_the_same_rounds(
    tmp_path: Path, flower: dict[str, str], sums: str
) -> None:
    """Also of masked sums, whose clients are a new process for each message."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^flwr run .*?[^\\]\n(?=```)", text, flags=re.MULTILINE | re.DOTALL)
    folder = tmp_path / "run"
    command = command.replace("rounds=2", f"rounds=2 launch.sums='{sums}'")
    words = shlex.split(command.replace("\\\n", " ").replace("/tmp/flower-run", str(folder)))
    flower_run(words, folder, flower)
    config = load("tiny").resolve(None, ["rounds=2", f"launch.sums={sums}"])
    check_same(folder, launch.run(config, tmp_path / "here", Progress()))


@pytest.mark.slow
def test_private_clients_with_rows_of_their_own(tmp_path: Path, flower: dict[str, str]) -> None:
    """Counts are asked for over Flower's grid, and the run is that of the simulation."""
    overrides = [*tiny_as_files(tmp_path), "rounds=1", "privacy.unit=example"]
    overrides += ["privacy.noise_multiplier=1.0", "privacy.delta=1e-3"]
    given = [re.sub(r"=(?!-?[\d.e-]+$)(.*)", r"='\1'", override) for override in overrides]
    folder, federation = tmp_path / "run", "num-supernodes=4 client-resources-num-cpus=1"
    words = ["flwr", "run", ".", "--stream", "--federation-config", federation]
    said = " ".join(given)  # of several --run-config, Flower keeps the last one's tables alone
    flower_run([*words, "--run-config", f"{said} folder='{folder}'"], folder, flower)
    config = from_run_config({**parse_config_args([said]), "recipe": "tiny"})
    check_same(folder, launch.run(config, tmp_path / "here", Progress()))


def flower_run(words: list[str], folder: Path, flower: dict[str, str]) -> None:
    """Run the command until its results are in the folder."""
    for _ in range(6):  # Flower gives its SuperLink 15 s to start, which a busy machine may need
        done = subprocess.run(
            words, cwd=ROOT, env=flower, capture_output=True, text=True, timeout=240
        )
        if "Failed to start local SuperLink" not in done.stdout + done.stderr:
            break
    assert (folder / "summary.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]


def check_same(folder: Path, here: Path) -> None:
    """Two folders hold the same rounds and the same adapter."""
    seen, expected = (
        [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        for path in (folder, here)
    )
    for record in [*seen, *expected]:
        del record["seconds"]
    assert seen == expected
    adapters = [
        (path / "adapter/adapter_model.safetensors").read_bytes() for path in (folder, here)
    ]
    assert adapters[0] == adapters[1]
