"""Fed-SB in a run of the tiny recipe: r squared numbers travel, and the result loads with PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from clients.client_app import app
from fedlora.config import ModelConfig
from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.models import load_model
from simulations import launch
from simulations.grid import InProcessGrid
from simulations.progress import Progress
from simulations.recipe import load

RANK, LAYERS, HEAD, CLIENTS = 4, 4, 2 * 32 + 2, 4
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
LORA_SB = "adapter.name=lora_sb"


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": 0} for record in rounds(folder)]


def run(folder: Path, *overrides: str, recipe: str = "tiny") -> Path:
    return launch.run(load(recipe).resolve(None, overrides), folder, Progress())


def test_it_runs_counts_and_is_exact(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "method=fed_sb")
    records = rounds(folder)
    assert "lora_sb" in (folder / "config.toml").read_text()  # the recipe says so for this rule
    for record in records[1:]:
        assert record["clients"] == [0, 1, 2, 3] and record["failures"] == []
        assert record["bytes_up"] == 4 * CLIENTS * (LAYERS * RANK**2 + HEAD)
        assert record["bytes_down"] == record["bytes_up"]
        assert record["aggregation_error"] == 0.0
    assert len({record["loss"] for record in records}) == 3
    base = load_model(ModelConfig(name="tiny_bert"), 2, "classify").module
    PeftModel.from_pretrained(base, str(folder / "adapter"))
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {key.split(".lora_")[1] for key in saved if ".lora_" in key} == {"A.weight", "B.weight"}
    assert any(value.any() for key, value in saved.items() if ".lora_B" in key)


def test_fedavg_on_this_adapter_is_the_same(tmp_path: Path) -> None:
    adapter = (LORA_SB, "adapter.options.alpha=8.0")
    folders = [run(tmp_path / name, *adapter, f"method={name}") for name in ("fed_sb", "fedavg")]
    assert untimed(folders[0]) == untimed(folders[1])


def test_packs_and_sums_on_workers_give_the_same_but_for_rounding(tmp_path: Path) -> None:
    quick = ("method=fed_sb", "task.rows_per_group=20", "rounds=2", "train.steps=3")
    found = []
    for name, how in (("alone", "launch.pack=1"), ("packed", "launch.sums=workers")):
        more = ("clients.number=6", "clients.split=iid", "launch.pack=4")
        folder = run(tmp_path / name, *quick, *more, how, recipe="digits")
        assert [record["clients"] for record in rounds(folder)[1:]] == [list(range(6))] * 2
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        found.append((saved, json.loads((folder / "summary.json").read_text())["pack"]))
    (one, alone), (packed, together) = found
    assert (alone, together) == (1, 4)
    for key in one:
        assert float((one[key] - packed[key]).norm() / one[key].norm()) < 1e-4, key


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus on its generator and hooks
def test_private_clients_charge_their_ledgers(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "method=fed_sb", *PRIVATE)
    assert [record["clients"] for record in rounds(folder)[1:]] == [[0, 1, 2, 3]] * 2
    for client in range(CLIENTS):
        events = Ledger(folder / "ledger").events(client)
        assert [event.steps for event in events] == [5, 5]


def test_whole_clients_can_be_protected(tmp_path: Path) -> None:
    private = ("privacy.unit=client", "privacy.noise_multiplier=1.0")
    records = rounds(run(tmp_path / "run", "method=fed_sb", *private))
    assert [record["merged"] for record in records] == [False, True, True]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method=fed_sb", "adapter.name=lora"), r"FedSb averages R .* 'lora_sb'"),
        (("method=fed_sb", "adapter.name=miss"), r"FedSb averages R .* 'lora_sb'"),
        (("method=ffa_lora", LORA_SB), r"this adapter has no factors A and B"),
        (("method=fed_sb", "adapter.rank=33"), r"adapter\.rank: found 33, allowed: at most 32"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_client_with_other_factors_is_told(tmp_path: Path) -> None:
    """As on a machine whose library finds other directions."""

    class Elsewhere(InProcessGrid):
        def deliver(self, messages: Any, timeout: float | None) -> Any:
            for message in messages:
                if message.metadata.message_type != "train":
                    continue
                ask = message.content["config"]
                ask["base"] = f"{str(ask['base']).split('-')[0]}-0000000000000000"
            return super().deliver(messages, timeout)

    from simulations import server_app

    config = load("tiny").resolve("fed_sb", ["rounds=1"])
    grid = Elsewhere(app, CLIENTS, progress=Progress())
    server_app.serve(config, grid, tmp_path / "run")
    (first,) = {
        failure["reason"]
        for failure in rounds(tmp_path / "run")[1]["failures"]
        if failure["stage"] == "train" and failure["client"] is not None
    }
    assert "find the same fixed factors in them" in first


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the collector
def test_in_process_and_ray_agree_bit_for_bit(tmp_path: Path) -> None:
    found = []
    for backend in ("inprocess", "ray"):
        folder = run(
            tmp_path / backend, "method=fed_sb", f"launch.backend={backend}", "launch.workers=2"
        )
        saved = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append((untimed(folder), saved))
    assert found[0] == found[1]
