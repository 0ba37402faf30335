"""Runs whose clients differ in rank: packs, sums, bytes, privacy, attackers, and Ray."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from simulations import launch
from simulations.dry_run import DryRun, dry_run
from simulations.dry_run_table import table
from simulations.progress import Progress
from simulations.recipe import Recipe, load

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files to the collector
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus, of its own hooks
]
THREE = ("adapter.ranks=[2, 4, 8]",)
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-4")
IMAGES = ("clients.number=6", "clients.split=iid", "train.steps=3", "task.rows_per_group=20")


def run(folder: Path, *changes: str, recipe: str = "tiny") -> Path:
    return launch.run(load(recipe).resolve(None, (*THREE, *changes)), folder, Progress())


def rounds(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
        assert record["failures"] == []
    return records


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def table_text(told: DryRun) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(told))
    return console.export_text()


@pytest.mark.parametrize("method", ["hetlora", "ffa_lora", "rolora", "lora_fair"])
def test_packs_train_what_one_by_one_trains(tmp_path: Path, method: str) -> None:
    """A model without dropout; float32 sums in another order are all that differs."""
    one, packed = (
        adapter(
            run(
                tmp_path / f"{pack}",
                *IMAGES,
                f"method={method}",
                "rounds=2",
                f"launch.pack={pack}",
                recipe="digits",
            )
        )
        for pack in (1, 4)
    )
    for key in one:
        assert float((one[key] - packed[key]).norm() / one[key].norm()) < 1e-4, key
        if "lora_A" in key:
            assert len(one[key]) == 8


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("method=ffa_lora",),
        ("method=rolora", "rounds=3"),
        ("method=lora_fair", "clients.number=8", "clients.fraction_train=0.4", "rounds=3"),
        ("launch.sums=workers", "clients.number=8", "launch.pack=3"),
    ],
)
def test_bytes_are_foretold_by_client(tmp_path: Path, changes: tuple[str, ...]) -> None:
    config = load("tiny").resolve(None, (*THREE, *changes))
    told, folder = dry_run(config), launch.run(config, tmp_path / "run", Progress())
    sent, trained = told.traffic, f"{told.trained_numbers:,} numbers by a client of rank 8"
    assert trained in table_text(told)
    first, summary = rounds(folder)[1], json.loads((folder / "summary.json").read_text())
    assert sent.exact
    assert (sent.up, sent.down) == (first["bytes_up"], first["bytes_down"])
    assert (sent.total_up, sent.total_down) == (summary["bytes_up"], summary["bytes_down"])


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Two layers of query and value, 32 to 32; a head of 2; clients of rank 2, 4, 8 and 2."""
    record = rounds(run(tmp_path / "run", "rounds=1"))[1]
    head = 32 * 2 + 2
    assert record["bytes_up"] == 4 * ((2 + 4 + 8 + 2) * 4 * (32 + 32) + 4 * head)
    assert record["bytes_down"] == 4 * 4 * (8 * 4 * (32 + 32) + head)


def test_samples_of_whole_clients_are_told_as_means() -> None:
    changes = ("privacy.unit=client", "privacy.noise_multiplier=2.0", "privacy.delta=1e-2")
    sent = dry_run(load("tiny").resolve(None, (*THREE, *changes, "clients.number=6"))).traffic
    head = 32 * 2 + 2
    assert sent.up == pytest.approx(sent.clients * 4 * ((2 + 4 + 8) / 3 * 4 * 64 + head))
    assert not sent.exact


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_sums_on_workers_are_the_servers(tmp_path: Path, method: str) -> None:
    shared = (f"method={method}", "clients.number=6", "launch.pack=3")
    server = adapter(run(tmp_path / "server", *shared))
    workers = adapter(run(tmp_path / "workers", *shared, "launch.sums=workers"))
    for key in server:
        assert torch.allclose(server[key], workers[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("pack", [1, 4])
def test_private_runs_charge_as_ever(tmp_path: Path, pack: int) -> None:
    folder = run(tmp_path / "run", *PRIVATE, f"launch.pack={pack}", "method=ffa_lora")
    ledger = Ledger(folder / "ledger")
    assert len(rounds(folder)) == 3
    assert [len(ledger.charges(client)) for client in range(4)] == [2] * 4


@pytest.mark.parametrize("attack", ["sign_flip", "rescaling", "gaussian"])
def test_attackers_have_their_own_ranks_too(tmp_path: Path, attack: str) -> None:
    changes = ("clients.attackers=1", f"clients.attack={attack}", "rounds=1")
    assert rounds(run(tmp_path / "run", *changes))[1]["clients"] == [0, 1, 2, 3]


def test_a_run_runs_again_from_its_own_recipe(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "rounds=1")
    again = load(str(first / "config.toml")).resolve()
    assert (again.adapter.rank, again.adapter.ranks) == (8, (2, 4, 8))
    second = launch.run(again, tmp_path / "second", Progress())
    assert all(torch.equal(value, adapter(second)[key]) for key, value in adapter(first).items())


def test_ranks_take_the_place_of_a_recipes_rank() -> None:
    """Of another table; in one and the same they must agree."""
    base = {"task": {"name": "tweets"}, "adapter": {"rank": 4}}
    own = Recipe("mine", "", {**base, "methods": {"fedavg": {"adapter": {"ranks": [1, 2]}}}})
    assert own.resolve().adapter.rank == 2
    assert Recipe("mine", "", base).resolve(None, ["adapter.ranks=[]"]).adapter.rank == 4
    agreeing = {"adapter": {"rank": 4, "ranks": [4, 2]}}
    assert Recipe("mine", "", agreeing).resolve().adapter.ranks == (4, 2)
    with pytest.raises(ConfigError, match=r"adapter.ranks: found \[4, 2\], allowed: .* 8; or"):
        Recipe("mine", "", {"adapter": {"rank": 8, "ranks": [4, 2]}}).resolve()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("private", [(), PRIVATE])
def test_the_same_bits_in_process_and_on_ray(tmp_path: Path, private: tuple[str, ...]) -> None:
    found = []
    for backend, workers in (("inprocess", 1), ("ray", 2)):
        where = (f"launch.backend={backend}", f"launch.workers={workers}", "method=hetlora")
        some = ("clients.number=6", "launch.pack=2", *where)
        folder = run(tmp_path / f"{backend}{workers}", *some, *private)
        found.append((rounds(folder), adapter(folder)))
    (records, tensors), (of_ray, adapter_of_ray) = found
    assert of_ray == records
    assert all(torch.equal(adapter_of_ray[key], value) for key, value in tensors.items())
