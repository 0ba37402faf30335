"""What a comparison of rules is held against: all rows at one client, and each client alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from clients.resident import Resident
from fedlora.adapters import load_into
from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load
from simulations.server_app import evaluating
from simulations.sweep import read_sweep
from strategies.sampling import wanted

torch.set_num_threads(1)

SWEEP = """# Rules and bounds, with skew of features and labels
recipe = "digits"
[set]
clients = { number = 30, split = "group_dirichlet", fraction_train = 0.6 }
train.steps = 2
[grid.method]
fedavg = { method = "fedavg" }
centralised = { clients = { number = 1, split = "iid", min_train_nodes = 1 }, train.steps = 36 }
alone = { method = "fedsa_lora", options.share = "none" }
alone_at_home = { method = "fedsa_lora", options.share = "none", evaluate.rows = "own_groups" }
"""


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_one_sweep_holds_rules_and_bounds(tmp_path: Path) -> None:
    (tmp_path / "bounds.toml").write_text(SWEEP)
    cells = {
        cell.name.rpartition("-")[0]: cell for cell in read_sweep(tmp_path / "bounds.toml").cells()
    }
    assert not any(cell.refused for cell in cells.values())
    configs = {name: cell.config for name, cell in cells.items() if cell.config}
    assert list(configs) == ["fedavg", "centralised", "alone", "alone_at_home"]
    clients = configs["fedavg"].clients
    assert wanted(clients.number, clients.fraction_train, clients.min_train_nodes) == 18
    assert [evaluating(config) for config in configs.values()] == [16, 1, 16, 30]


def test_a_single_client_trains_on_all_rows(tmp_path: Path) -> None:
    changes = ("clients.number=1", "clients.split=iid", "clients.min_train_nodes=1", "rounds=1")
    config = load("tiny").resolve("fedavg", [*changes, "train.steps=1", "task.rows_per_group=10"])
    last = rounds(launch.run(config, tmp_path / "run", Progress()))[-1]
    assert (last["merged"], last["clients"], last["failures"]) == (True, [0], [])
    assert last["aggregation_error"] < 1e-6
    here = Resident(config.client())
    assert numpy.array_equal(here.parts[0], numpy.arange(len(here.task.train)))


def test_local_training_alone_is_measured_on_each_clients_groups(tmp_path: Path) -> None:
    """Two rounds of three clients with a kind of digit each, by hand; nothing travels."""
    changes = ("options.share=none", "evaluate.rows=own_groups", "task.rows_per_group=30")
    config = load("digits").resolve("fedsa_lora", [*changes, "rounds=2", "train.steps=2"])
    folder = launch.run(config, tmp_path / "run", Progress())
    last = rounds(folder)[-1]
    assert (last["bytes_up"], last["bytes_down"], last["failures"]) == (0, 0, [])
    here = Resident(config.client())
    held, kinds = here.task.test, here.task.group_names
    inputs, labels = here.model.base.encode(held), torch.from_numpy(held.labels)
    for client, kind in enumerate(kinds):
        own = dict(here.first)
        for server_round in (1, 2):
            load_into(here.model.trained, own)
            own = dict(here.train(client, server_round, config.train, ("A", "B")).tensors)
        kept = load_file(folder / "personal" / str(client) / "adapter_model.safetensors")
        assert kept.keys() == own.keys() and all(torch.equal(kept[key], own[key]) for key in own)
        load_into(here.model.trained, own)
        rows = [int(row) for row in numpy.flatnonzero(held.groups == client)]
        with torch.inference_mode():
            answers = here.model.module.eval()(**inputs(rows)).logits.argmax(dim=1)
        right = int((answers == labels[rows]).sum())
        assert last["groups"][kind] == right / len(rows)
    assert last["accuracy"] == pytest.approx(numpy.mean(list(last["groups"].values())))
