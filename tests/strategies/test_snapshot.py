"""A strategy that goes on from a snapshot: the same rounds as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fedlora.ledger import Ledger
from fedlora.rounds import GlobalState, RoundRecord
from strategies import ClientPrivacy
from strategies.base import LoraStrategy
from strategies.client_privacy import AdaptiveClip
from strategies.snapshot import CARRIED, Snapshot
from tests.helpers import (
    FACTOR_METHODS,
    ScriptedGrid,
    build,
    random,
    random_adapter,
    record_of,
    reply,
)
from tests.strategies.test_world import world

ROUNDS, CLIENTS = 5, 4
AVERAGING = [name for name, rule in FACTOR_METHODS.items() if rule.averages]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FACTOR_METHODS},
    "fedsvd, every other round": ("fedsvd", {"every": 2}),
    "half of the clients": ("fedavg", {"fraction_train": 0.5, "seed": 7}),
    **{f"{name}, Adam": (name, {"server": "adam"}) for name in AVERAGING},
    "fedavg, momentum": ("fedavg", {"server": "momentum"}),
    **{
        name: ("fedavg", {"world": world({0: 1.0, 1: 3.0, 2: 4.0, 3: 9.0}, **options), **more})
        for name, options, more in (
            ("spare clients", {"over_select": 1.5, "dropout": 0.2}, {"fraction_train": 0.5}),
            ("a buffer", {"mode": "fedbuff", "buffer": 2, "dropout": 0.2}, {"server": "adam"}),
        )
    },
}


def answer(node: int, message: Message) -> RecordDict | Error:
    """What was sent of what trains, moved by numbers of this client and round; one fails."""
    trains, number = str(message.content["config"]["train"]), int(message.metadata.group_id)
    if (node, number) == (1, ROUNDS - 1):
        return Error(0, "no")
    arrays = {}
    for place, (name, array) in enumerate(message.content["arrays"].items()):
        if "lora_" not in name or any(f"lora_{factor}" in name for factor in trains):
            value = array.numpy()
            change = 0.1 * random(*value.shape, seed=10_000 * number + 100 * node + place)
            arrays[name] = Array((value + change.numpy()).astype(value.dtype))
    return reply(ArrayRecord(arrays), 3 + node, client=100 - node)


def rounds(
    strategy: LoraStrategy, last: int, resume: Snapshot | None = None
) -> tuple[list[RoundRecord], ArrayRecord, list[Snapshot]]:
    """Records without times, the adapter, and a snapshot of every round."""
    records, snapshots = [], []

    def on_round(record: RoundRecord, arrays: ArrayRecord) -> None:
        records.append(replace(record, seconds=0.0))
        snapshots.append(Snapshot.of(strategy, record.round, arrays))

    grid = ScriptedGrid(CLIENTS, answer)
    start = record_of(random_adapter(0))
    result = strategy.start(grid, start, num_rounds=last, on_round=on_round, resume=resume)
    return records, result.arrays, snapshots


def numbers(arrays: ArrayRecord) -> dict[str, bytes]:
    """Every number, bit for bit, in whichever order they lie in memory."""
    return {name: array.numpy().tobytes() for name, array in arrays.items()}


def check(make: Callable[[], LoraStrategy]) -> None:
    """From each round's snapshot, the later rounds are those of the run that went through."""
    records, arrays, snapshots = rounds(make(), ROUNDS)
    assert any(record.merged for record in records)
    for done in range(ROUNDS + 1):
        again, found, _ = rounds(make(), ROUNDS, snapshots[done])
        assert again == records[done + 1 :]
        assert numbers(found) == numbers(arrays)


@pytest.mark.parametrize("case", CASES)
def test_every_rule_goes_on_from_any_round(case: str) -> None:
    method, options = CASES[case]
    check(lambda: build(method, **options))


@pytest.mark.parametrize("ledgered", [True, False])
def test_a_clip_that_moved_stays_where_it_was(tmp_path: Path, ledgered: bool) -> None:
    """With a ledger, every round of the second start has been charged, and is the same release."""
    ledger = Ledger(tmp_path) if ledgered else None

    def make() -> LoraStrategy:
        privacy = ClientPrivacy(
            noise_multiplier=0.5,
            clip=0.5,
            clients=CLIENTS,
            fraction=0.7,
            adaptive=AdaptiveClip(count_noise=2.0),
            ledger=ledger,
        )
        return build("fedavg", client_privacy=privacy, server="adam")

    check(make)
    if ledger:
        charges = ledger.charges(None)
        assert [charge.round for charge in charges] == list(range(1, ROUNDS + 1))


def test_a_snapshot_holds_all_that_one_round_leaves_to_the_next() -> None:
    """A field that ``GlobalState`` gains must be carried, or named here."""
    kept_elsewhere = {"adapter", "round"}
    carried = {*CARRIED} - {"clock"}  # which is no part of it, and has cases of its own
    assert {field.name for field in fields(GlobalState)} == {*carried, *kept_elsewhere}
