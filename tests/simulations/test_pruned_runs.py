"""Runs whose clients prune their ranks: bytes, what is foretold, resuming, and Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.errors import ConfigError
from simulations import launch
from simulations.chaos_runs import tree
from simulations.dry_run import dry_run
from simulations.progress import Progress
from simulations.recipe import load
from tests.simulations.resumed import die_everywhere
from tests.simulations.resumed import run as go

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's open files
torch.set_num_threads(1)

QUICK = ("task.rows_per_group=10", "train.steps=4", "train.optimizer=sgd", "rounds=4")
RANKS = ("method=hetlora", "adapter.ranks=[8, 4]", "train.learning_rate=0.05")
PRUNES = (*RANKS, "options.gamma=0.5", "options.penalty=20.0")


def rounds(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
        assert record["failures"] == []
    return records


def sent(ranks: int) -> int:
    """Bytes of clients whose ranks add up to this; see ``test_rank_runs``."""
    return 4 * (ranks * 4 * (32 + 32) + 4 * (32 * 2 + 2))


def test_bytes_fall_and_nobody_could_know(tmp_path: Path) -> None:
    """B is zero at first, so in round 1 nobody's last units can shrink."""
    config = load("tiny").resolve(None, [*QUICK, *PRUNES])
    assert not dry_run(config).traffic.exact
    records = rounds(launch.run(config, tmp_path / "run", Progress()))
    up = [record["bytes_up"] for record in records[1:]]
    assert up[0] == sent(8 + 4 + 8 + 4)
    assert up == sorted(up, reverse=True) and sent(4) <= up[-1] < up[0]
    assert len({record["bytes_down"] for record in records[1:]}) == 1
    assert dry_run(load("tiny").resolve(None, [*QUICK, *RANKS])).traffic.exact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("options.gamma=0.5",), r"options.gamma: found 0.5, allowed: 1 without adapter.ranks"),
        (("options.penalty=0.5",), r"options.penalty: found 0.5, allowed: 0 with gamma = 1"),
        (("options.gamma=1.5", "adapter.ranks=[8]"), r"options.gamma: found 1.5, allowed: "),
        (("options.penalty=-1.0", "adapter.ranks=[8]"), r"options.penalty: found -1.0, allowed: "),
    ],
)
def test_options_that_prune_nothing_end_in_one_line(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load("tiny").resolve("hetlora", changes)
    assert "\n" not in str(error.value)


def test_a_run_that_dies_goes_on_with_the_ranks_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path / "whole", *QUICK, *PRUNES)
    assert (ups := [record["bytes_up"] for record in rounds(tmp_path / "whole")])[-1] < ups[1]
    points = ["upload", "after-commit"]
    die_everywhere(monkeypatch, points, 4, tmp_path / "killed", *QUICK, *PRUNES)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_bits_in_process_and_on_ray(tmp_path: Path) -> None:
    found = []
    for backend, workers in (("inprocess", 1), ("ray", 2)):
        where = (f"launch.backend={backend}", f"launch.workers={workers}", "launch.pack=2")
        config = load("tiny").resolve(None, [*QUICK, *PRUNES, *where])
        folder = launch.run(config, tmp_path / backend, Progress())
        found.append((rounds(folder), load_file(folder / "adapter" / "adapter_model.safetensors")))
    (records, tensors), (of_ray, adapter_of_ray) = found
    assert records[-1]["bytes_up"] < records[1]["bytes_up"]
    assert of_ray == records
    assert all(torch.equal(adapter_of_ray[key], value) for key, value in tensors.items())
