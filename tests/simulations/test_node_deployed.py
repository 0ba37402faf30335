"""A trainer under Flower's own SuperLink and SuperNodes: the same adapter as in process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from simulations import bench_deploy, launch
from simulations.node.loopback import loopback
from simulations.progress import Progress
from simulations.recipe import load

ROOT = Path(__file__).parent.parent.parent
CHANGES = ["clients.number=2", "rounds=2"]
pytestmark = pytest.mark.slow  # deployments too, but minutes of them


def kill_when(records: Path, keeper: int, killed: list[int]) -> None:
    """Kill the trainer once a round is done."""
    end = time.monotonic() + 240
    while time.monotonic() < end and not killed:
        if records.exists() and records.read_text().count("\n") == 2:  # rounds 0 and 1
            for child in psutil.Process(keeper).children(True):
                if child.name().startswith("ray::Trainer"):
                    child.kill()
                    killed.append(child.pid)
        time.sleep(0.05)


def test_two_nodes_share_a_trainer_that_is_killed(tmp_path: Path) -> None:
    out, killed = tmp_path / "run", list[int]()
    with loopback(tmp_path) as here:
        state = here.trainer("trainer")
        for node in range(2):
            config = {"partition-id": node, "num-partitions": 2, "trainer": str(state)}
            here.supernode(f"supernode-{node}", config)
        keeper = here.processes["trainer"].pid
        killer = threading.Thread(target=kill_when, args=(out / "rounds.jsonl", keeper, killed))
        killer.start()
        told = ['recipe="tiny"', f'overrides="{" ".join(CHANGES)}"', f'folder="{out}"']
        said = here.submit(ROOT, told)
        killer.join()
        logs = [path.read_text(errors="replace") for path in tmp_path.glob("supernode-*.log")]
    assert (out / "summary.json").exists(), said[-3000:]
    assert killed and f"process {killed[0]} died" in (tmp_path / "trainer.log").read_text()
    assert len(logs) == 2 and not any("raised an exception" in log for log in logs)

    expected = launch.run(load("tiny").resolve(None, CHANGES), tmp_path / "here", Progress())
    adapter = "adapter/adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (expected / adapter).read_bytes()
    seen, wanted = (
        [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        for path in (out, expected)
    )
    for record in [*seen, *wanted]:
        del record["seconds"]
    assert seen == wanted


def test_the_bench_measures_three_kinds_of_rounds() -> None:
    rows = bench_deploy.deploy(1, lambda text: None, "tiny")
    assert [(row.pairs, row.allowed) for row in rows] == [(1, 1.5), (1, None), (1, None)]
    assert rows[0].ours == rows[2].ours and rows[1].ours == rows[2].peer
    assert all(0 < row.ratio < 1000 for row in rows)
