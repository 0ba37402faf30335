"""A run from its recipe to its folder: what is left behind, and that it can be trusted."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftModel

from clients.local import Rows, evaluate
from fedlora.config import ModelConfig, RunConfig, TaskConfig, TrainConfig
from fedlora.models import load_model
from fedlora.tasks import load_task
from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load
from simulations.results import TRACK
from simulations.server_app import threads


def run(tmp_path: Path, *overrides: str, recipe: str = "tiny") -> Path:
    return launch.run(load(recipe).resolve(None, overrides), tmp_path / "run", Progress())


def rounds(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_held_out_rows_are_measured_every_third_round(tmp_path: Path) -> None:
    """And at first and at last; what is learned, and what was measured, are as ever."""
    seldom = run(tmp_path / "seldom", "rounds=5", "evaluate.held_out_every=3")
    always = run(tmp_path / "always", "rounds=5")
    found, others = rounds(seldom), rounds(always)
    assert [record["round"] for record in found if record["loss"] is not None] == [0, 3, 5]
    for record, other in zip(found, others, strict=True):
        unmeasured = (
            {"loss": None, "accuracy": None, "groups": {}} if record["loss"] is None else {}
        )
        assert {**record, "seconds": 0} == {**other, **unmeasured, "seconds": 0}
    adapters = [one / "adapter" / "adapter_model.safetensors" for one in (seldom, always)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_a_run_leaves_its_folder(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path, f"method={method}")
    assert {path.name for path in folder.iterdir()} - {TRACK} == {
        "config.toml",
        "environment.json",
        "rounds.jsonl",
        "summary.json",
        "adapter",
        "curves.png",
    }
    records = rounds(folder)
    assert [record["round"] for record in records] == [0, 1, 2]
    wanted = "round train_loss loss accuracy groups aggregation_error bytes_up bytes_down seconds"
    assert set(f"{wanted} clients failures".split()) <= set(records[0])
    assert records[0]["train_loss"] is None and records[0]["loss"] is not None
    assert records[0]["aggregation_error_by_layer"] == {}
    for record in records[1:]:
        layers = record["aggregation_error_by_layer"]
        assert [*layers] == [
            f"bert.encoder.layer.{number}.attention.self.{name}"
            for number in range(2)
            for name in ("query", "value")
        ]
        assert min(layers.values()) <= record["aggregation_error"] <= max(layers.values())
        assert record["clients"] == [0, 1, 2, 3] and record["failures"] == []
        assert set(record["groups"]) == {"short", "long"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy"] == records[-1]["accuracy"]
    assert summary["bytes_up"] == sum(record["bytes_up"] for record in records)
    table = tomllib.loads((folder / "config.toml").read_text())
    assert RunConfig.model_validate(table) == load("tiny").resolve(method)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1 and environment["packages"]["torch"] == torch.__version__


def test_bytes_are_those_of_the_tensors_that_travel(tmp_path: Path) -> None:
    # tiny_bert: query and value of 2 layers are 32 to 32, r = 4; the head is 2 x 32 + 2.
    both = run(tmp_path / "a", "method=fedavg")
    only_B = run(tmp_path / "b", "method=ffa_lora")
    pair, head = 4 * 4 * (32 + 32), 2 * 32 + 2
    for folder, numbers in ((both, pair + head), (only_B, pair // 2 + head)):
        for record in rounds(folder)[1:]:
            assert record["bytes_up"] == record["bytes_down"] == 4 * 4 * numbers


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_the_adapter_gives_the_recorded_accuracy_again(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path, f"method={method}", "train.learning_rate=2e-2")
    task = load_task(TaskConfig(name="tweets"))
    base = load_model(ModelConfig(name="tiny_bert", max_length=24), 2, "classify")
    model = PeftModel.from_pretrained(base.module, str(folder / "adapter"))
    rows = Rows(base.encode(task.test), torch.from_numpy(task.test.labels))
    with threads(1):
        order, one = numpy.arange(len(rows)), numpy.zeros(len(rows), dtype=numpy.int64)
        seen = evaluate(model, rows, order, one, "classify", TrainConfig())[0]
    last = rounds(folder)[-1]
    assert seen.correct / seen.examples == last["accuracy"]
    assert seen.loss / seen.examples == pytest.approx(last["loss"], rel=1e-5)  # other batches


def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / name, f"seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    bits = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders]
    assert bits[0] == bits[1] != bits[2]


def test_a_failing_client_is_named_and_the_round_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients.resident import Resident

    train = Resident.train

    def break_client_2(self: Resident, client: int, *rest: object) -> object:
        if client == 2:
            raise RuntimeError("the disk of client 2 is on fire")
        return train(self, client, *rest)

    monkeypatch.setattr(Resident, "train", break_client_2)
    records = rounds(run(tmp_path))
    assert records[1]["clients"] == [0, 1, 3]
    (failure,) = records[1]["failures"]
    assert failure["client"] == 2 and "on fire" in failure["reason"]


def test_too_few_good_replies_keep_the_adapter(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.learning_rate=1e30", "train.optimizer=sgd")
    records = rounds(folder)
    assert not records[1]["merged"] and records[1]["loss"] == records[0]["loss"]
    reasons = [failure["reason"] for failure in records[1]["failures"]]
    assert sum("diverged" in reason for reason in reasons) == 4
    assert any("min_train_nodes" in reason for reason in reasons)


def test_a_causal_model_reports_perplexity(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        "task.name=tweets_lm",
        "model.name=tiny_llama",
        'adapter.target_modules=["q_proj", "v_proj"]',
        "train.learning_rate=5e-2",
    )
    records = rounds(folder)
    first, last = records[0]["perplexity"], records[-1]["perplexity"]
    assert isinstance(first, float) and isinstance(last, float) and last < first
    groups = records[-1]["perplexities"]
    assert set(groups) == {"short", "long"} and min(groups.values()) < last < max(groups.values())
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["perplexity"], summary["perplexities"]) == (last, groups)


def test_miss_averages_exactly(tmp_path: Path) -> None:
    folder = run(tmp_path, "adapter.name=miss")
    assert [record["aggregation_error"] for record in rounds(folder)] == [None, 0.0, 0.0]


def test_fewer_clients_than_all_take_part_by_the_seed(tmp_path: Path) -> None:
    records = rounds(run(tmp_path, "clients.number=8", "clients.fraction_train=0.5", "rounds=3"))
    drawn = [tuple(record["clients"]) for record in records[1:]]
    assert all(len(clients) == 4 for clients in drawn) and len(set(drawn)) > 1
