"""Masked sums in whole runs: the numbers of a run in the clear, however clients train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from clients import budget, masked_input
from clients.client_app import app
from clients.masked_input import Turn
from clients.resident import resident
from fedlora.errors import ConfigError, PrivacyError
from fedlora.fixed_point import FixedPoint
from fedlora.wire import Layout
from simulations import launch
from simulations.chaos_runs import tree
from simulations.forecast import traffic
from simulations.grid import InProcessGrid
from simulations.progress import Progress
from simulations.recipe import load
from simulations.server_app import strategy_for
from tests.simulations import resumed

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its files
QUICK = (
    "rounds=2", "train.steps=1", "train.batch_size=4", "model.max_length=8", "clients.number=5",
    "task.rows_per_group=8",
)  # fmt: skip
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
HALF_A_LEVEL = FixedPoint(16.0, 32, 2**20, 5).step / 2


class Ran:
    """What a run left."""

    def __init__(self, folder: Path, method: str, sums: str, *changes: str) -> None:
        where = [*QUICK, f"launch.sums={sums}", *changes]
        self.config = load("tiny").resolve(method, where)
        self.folder = launch.run(self.config, folder, Progress())
        lines = (self.folder / "rounds.jsonl").read_text().splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.adapter = load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def told(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "seconds"} for record in self.records]


def off(one: Ran, other: Ran) -> float:
    """The largest difference of any number of two adapters."""
    assert one.adapter.keys() == other.adapter.keys()
    return max(float((one.adapter[k] - other.adapter[k]).abs().max()) for k in one.adapter)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedavg", ("launch.pack=3", "adapter.ranks=[2, 4]")),
        ("lora_fair", ("launch.pack=2",)),
        ("ffa_lora", (*PRIVATE, "launch.pack=3")),
    ],
)
def test_a_masked_run_is_the_run_in_the_clear(
    tmp_path: Path, method: str, changes: tuple[str, ...]
) -> None:
    """One round: a mean is off by half a level, and its float32 by its own rounding."""
    clear, masked = (
        Ran(tmp_path / sums, method, sums, *changes, "rounds=1") for sums in ("server", "masked")
    )
    assert 0 < off(clear, masked) < (1e-5 if method == "lora_fair" else 4 * HALF_A_LEVEL)
    for ours, theirs in zip(masked.records, clear.records, strict=True):
        assert (ours["clients"], ours["failures"]) == (theirs["clients"], [])
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-8)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    if changes[:1] == PRIVATE[:1]:
        ledgers = [sorted((run.folder / "ledger").iterdir()) for run in (clear, masked)]
        texts = [[_events(path) for path in ledger] for ledger in ledgers]
        assert texts[0] == texts[1] and len(texts[0]) == 5


def _events(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "at")} for line in lines]


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_bits_on_ray_under_other_masks(tmp_path: Path) -> None:
    """Masks are other ones in each run, and cancel to the bit."""
    here = Ran(tmp_path / "here", "lora_fair", "masked", "launch.pack=2")
    there = Ran(
        tmp_path / "there", "lora_fair", "masked", "launch.pack=2", "launch.backend=ray",
        "launch.workers=2",
    )  # fmt: skip
    assert here.told() == there.told() and off(here, there) == 0


def test_who_is_late_on_a_virtual_clock_is_one_that_dropped_out(tmp_path: Path) -> None:
    clock = ("clock.mode=rounds", "clock.speeds=lognormal", "clock.over_select=1.3")
    share = ("clients.fraction_train=0.75", "clients.number=8")
    clear, masked = (
        Ran(tmp_path / sums, "fedavg", sums, *clock, *share, "rounds=1")
        for sums in ("server", "masked")
    )
    assert masked.records[1]["merged"] and len(masked.records[1]["failures"]) == 2
    assert masked.records[1]["clients"] == clear.records[1]["clients"]
    assert off(clear, masked) < 4 * HALF_A_LEVEL


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedsvd", ("secure.bits=12", "secure.examples=200")),
        ("lora_fair", ()),
    ],
)
def test_bytes_are_foretold(tmp_path: Path, method: str, changes: tuple[str, ...]) -> None:
    ran = Ran(tmp_path / "run", method, "masked", *changes)
    here = resident(ran.config.client())
    strategy = strategy_for(ran.config, here.model.scales())
    found = traffic(ran.config, strategy, strategy.prepare(_arrays(here)))
    assert found.total_up == sum(record["bytes_up"] for record in ran.records)
    assert found.total_down == sum(record["bytes_down"] for record in ran.records)
    assert found.exact == (method != "lora_fair")


def _arrays(here: Any) -> Any:
    from flwr.app import ArrayRecord

    arrays = ArrayRecord(here.first)
    assert Layout.of(arrays)
    return arrays


def test_the_ledger_is_charged_before_the_masked_upload_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    charge, over = budget.Gate.charge, Turn.over

    def charged(gate: budget.Gate) -> None:
        charge(gate)
        done.append(f"charged {gate.client}")

    def masked(turn: Turn, message: Message, reply: Message) -> Any:
        done.append(f"masked {turn.node}")
        return over(turn, message, reply)

    monkeypatch.setattr(budget.Gate, "charge", charged)
    monkeypatch.setattr(masked_input.Turn, "over", masked)
    Ran(tmp_path / "run", "ffa_lora", "masked", *PRIVATE, "launch.pack=1", "rounds=1")
    assert done == [f"{what} {client}" for client in range(5) for what in ("charged", "masked")]


def test_a_node_that_masks_alone_trains_no_pack_in_the_clear() -> None:
    grid = InProcessGrid(app, 2)
    for context in grid.contexts.values():
        context.node_config["masked"] = 2
    messages = [Message(RecordDict({"config": ConfigRecord()}), n, "train") for n in (0, 1)]
    with pytest.raises(PrivacyError, match="this node sends masked updates alone"):
        app.train_pack(messages, list(grid.contexts.values()))


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("krum", "seed=0", r"launch.sums: found 'masked', allowed: 'server': krum with"),
        ("lora_fair", "options.ridge=0.0", r"options.ridge: found 0.0, allowed: above 0"),
        ("fedavg", "secure.examples=10000000000", r"secure.examples: found 10000000000"),
        ("fedavg", "secure.threshold=0.5", r"secure.threshold: found 0.5"),
        ("fedavg", "secure.bit=3", r"secure.*'bit'.*bits"),
        ("fedavg", "privacy.unit=client", r"client-level privacy"),
        ("fedavg", "clock.over_select=1.5", r"clock.over_select: found 1.5, allowed: below 1.5"),
        ("fedavg", "clock.mode=fedbuff", r"launch.sums = 'masked', which sees no update's age"),
    ],
)
def test_recipes_that_cannot_be_masked(method: str, change: str, reason: str) -> None:
    more = ["privacy.noise_multiplier=1.0"] if "privacy" in change else []
    more += ["clock.buffer=2"] if "buff" in change else []
    more += ["clock.mode=rounds", "clock.speeds=lognormal"] if "over" in change else []
    with pytest.raises(ConfigError, match=reason):
        load("tiny").resolve(method, ["launch.sums=masked", change, *more])


@pytest.mark.slow
def test_a_masked_run_that_dies_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("method=lora_fair", "launch.sums=masked", "rounds=2", "train.steps=1")
    resumed.run(tmp_path / "whole", *changes)
    resumed.die(monkeypatch, "received@2", tmp_path / "killed", *changes)
    resumed.run(tmp_path / "killed", *changes, resume=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
