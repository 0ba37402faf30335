"""FLoRA and FedEx-LoRA in runs: what travels, what is trained on, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from flwr.app import ArrayRecord, Message
from peft import PeftModel
from safetensors.torch import load_file

from clients.client_app import app
from clients.local import evaluate
from clients.resident import Resident
from fedlora.ledger import Ledger
from fedlora.models import load_model
from fedlora.wire import size
from simulations import launch
from simulations.answers import answer
from simulations.grid import InProcessGrid
from simulations.progress import Progress
from simulations.recipe import load
from simulations.server_app import serve
from strategies import METHODS
from tests.helpers import bits
from tests.simulations.test_private_artefacts import Watching

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus, of its own hooks
CHANGING = [name for name, rule in METHODS.items() if rule.changes_base]
# query and value of 2 layers are 32 to 32, r = 4; the head 66; 4 clients
LAYERS, NUMBERS, FULL, HEAD = 4, 4 * (32 + 32), 32 * 32, 66
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")


def run(folder: Path, *overrides: str) -> Path:
    return launch.run(load("tiny").resolve(None, overrides), folder, Progress())


def rounds(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", CHANGING)
def test_rounds_are_exact_and_count_their_bytes(tmp_path: Path, method: str) -> None:
    records = rounds(run(tmp_path / "run", f"method={method}", "rounds=3"))
    each = {"flora": 4 * NUMBERS, "fedex_lora": 3 * NUMBERS}[method]
    for record in records[1:]:
        assert record["clients"] == [0, 1, 2, 3] and record["failures"] == []
        assert record["aggregation_error"] < 1e-6
        before = LAYERS * min(FULL, each * (record["round"] - 1))
        assert record["bytes_up"] == 4 * 4 * (LAYERS * NUMBERS + HEAD)
        assert record["bytes_down"] == 4 * 4 * (LAYERS * NUMBERS + HEAD + before)
    assert len({record["loss"] for record in records}) == 4


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("rounds_run", [1, 3])
def test_the_saved_adapter_is_the_whole_model(tmp_path: Path, method: str, rounds_run: int) -> None:
    """PEFT loads it onto a base of its own, which then measures what the last round did.

    After one round FedEx-LoRA's change is factors, after three it is a matrix.
    """
    changes = (
        f"method={method}",
        f"rounds={rounds_run}",
        "train.learning_rate=0.05",
        "adapter.options.use_rslora=true",
    )
    folder = run(tmp_path / "run", *changes)
    config = load("tiny").resolve(None, changes)
    here = Resident(config.client())
    base = load_model(config.model, 2, "classify")
    model = PeftModel.from_pretrained(base.module, str(folder / "adapter"))
    order = numpy.arange(here.held_out())
    rows = here._encode(here._measured(here.task))
    (seen,) = evaluate(model, rows, order, 0 * order, "classify", config.train).values()
    last = rounds(folder)[-1]
    assert seen.loss / seen.examples == pytest.approx(last["loss"], rel=1e-5)
    assert seen.correct / seen.examples == pytest.approx(last["accuracy"])
    ranks = {key: tensor.shape for key, tensor in saved(folder).items() if "lora_A" in key}
    wide = {("fedex_lora", 1): 4 + 12}.get((method, rounds_run), 4 + 32)
    assert set(ranks.values()) == {(wide, 32)}


@pytest.mark.parametrize("method", CHANGING)
def test_clients_train_on_the_base_of_their_round(tmp_path: Path, method: str) -> None:
    """A client of round 3 against one whose weights were added to by hand."""
    config = load("tiny").resolve(method, ["rounds=3", "launch.pack=1", "train.learning_rate=0.02"])
    grid = Watching()
    serve(config, grid, tmp_path / "run")
    message, reply = grid.asked["3", 2], grid.replied["3", 2]
    told = message.content.array_records["base"].to_torch_state_dict()
    here = Resident(config.client())
    for pair, layer in here.model.pair_layers().items():
        weight = layer.get_base_layer().weight.data
        weight += told[pair.format("dense")]
    here.load(message.content.array_records["arrays"].to_torch_state_dict())
    expected = here.train(2, 3, config.train, ("A", "B")).tensors
    found = reply.array_records["arrays"].to_torch_state_dict()
    start = message.content.array_records["arrays"].to_torch_state_dict()
    for key, tensor in expected.items():
        moved = float((tensor - start[key]).norm())
        assert float((tensor - found[key]).norm()) < 1e-3 * moved, key


@pytest.mark.parametrize("method", CHANGING)
def test_packs_train_what_one_by_one_trains(tmp_path: Path, method: str) -> None:
    """A model without dropout, whose adapted layers are not square."""
    images = ("clients.number=6", "clients.split=iid", "rounds=2", "train.steps=3")
    found = []
    for pack in (1, 4):
        changes = (*images, "task.rows_per_group=20", f"launch.pack={pack}")
        config = load("digits").resolve(method, changes)
        found.append(saved(launch.run(config, tmp_path / f"{pack}", Progress())))
    for key in found[0]:
        if "lora_A" in key:
            one, packed = (own[key.replace("lora_A", "lora_B")] @ own[key] for own in found)
            assert float((one - packed).norm() / one.norm()) < 1e-4, key


def test_a_run_after_it_has_the_first_weights(tmp_path: Path) -> None:
    """The resident of this process outlives the run."""
    found = []
    for number, method in enumerate(("fedavg", "flora", "fedavg")):
        folder = run(tmp_path / f"{number}", f"method={method}")
        found.append((rounds(folder), bits(ArrayRecord(dict(saved(folder))))))
    assert found[0] == found[2]


def test_a_private_release_depends_on_the_base(tmp_path: Path) -> None:
    """The same message again costs nothing; on another base there is other noise, at its price."""
    grid, folder = Watching(), tmp_path / "run"
    serve(load("tiny").resolve("flora", [*PRIVATE, "launch.pack=1"]), grid, folder)
    message, first = grid.asked["2", 1], grid.replied["2", 1]
    ledger = Ledger(folder / "ledger")
    assert len(ledger.charges(1)) == 2

    def again(message: Message) -> dict[str, bytes]:
        return bits(answer(app, message, grid.contexts[1]).content.array_records["arrays"])

    assert again(message) == bits(first.array_records["arrays"])
    assert len(ledger.charges(1)) == 2
    told = message.content.array_records["base"].to_torch_state_dict()
    key = next(iter(told))
    told[key] = told[key] + 1e-6
    message.content["base"] = ArrayRecord(dict(told))
    assert again(message) != bits(first.array_records["arrays"])
    assert len({charge.release for charge in ledger.charges(1)}) == 3


def test_every_message_tells_of_the_same_record(tmp_path: Path) -> None:
    """One object for all clients of a stage, so that a grid can share it."""

    class Keeping(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            sent = list(messages)
            told.append([message.content.array_records.get("base") for message in sent])
            return super().send_and_receive(sent, timeout=timeout)

    told: list[list[ArrayRecord | None]] = []
    serve(load("tiny").resolve("flora"), Keeping(app, 4), tmp_path / "run")
    # round 0 is measured, then rounds 1 and 2 are trained and measured
    assert [len(set(map(id, stage))) for stage in told] == [1] * 5
    assert [None if stage[0] is None else size(stage[0]) for stage in told] == [
        None,
        None,
        *[4 * LAYERS * FULL] * 3,
    ]
