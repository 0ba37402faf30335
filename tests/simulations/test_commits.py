"""What a commit holds comes back bit for bit, and so does a record from its line."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.rounds import Failure, RoundRecord
from simulations.chaos_runs import config
from simulations.commits import Commits, latest
from simulations.results import RunFolder
from strategies.snapshot import Snapshot

RECORD = RoundRecord(
    round=0,
    merged=True,
    loss=0.1,
    groups={"b": 0.5, "a": 1 / 3},
    clients=(2, 0),
    failures=(Failure(None, "round", "few"), Failure(1, "train", "late")),
    clip=0.3,
    halved={4: 2, 11: 1},
)


def context(client: int) -> Context:
    return Context(1, client, {}, RecordDict(), {})


def kept() -> RecordDict:
    arrays = ArrayRecord(OrderedDict(z=Array(torch.ones(2, 3).half().numpy()), a=empty()))
    metrics = MetricRecord({"n": 3, "x": 3.0, "nan": float("inf"), "many": [1, 2], "few": [1.0]})
    notes = {"b": b"\x00\xff", "bs": [b"1"], "on": True, "flags": [False], "text": "é", "n": 1}
    return RecordDict({"own": arrays, "seen": metrics, "notes": ConfigRecord(dict(notes))})


def empty() -> Array:
    return Array(torch.zeros(0, 4, dtype=torch.float64).numpy())


def test_all_that_is_committed_comes_back(tmp_path: Path) -> None:
    """Names in their order, any dtype and shape, tensors that share memory, slashes in names."""
    shared = torch.arange(6, dtype=torch.float64) / 7
    snapshot = Snapshot(
        round=3,
        arrays={"z": torch.randn(2, 3), "a/b": torch.randn(3, 2).T, "m": torch.ones(1).half()},
        carried={
            "memory": {
                **{"whole": shared, "part": shared[2:], "scalar": torch.tensor(0.1).double()},
                **{"none": torch.zeros(0, 2), "count": torch.tensor([2**53 + 1])},
                **{"short": torch.randn(3).bfloat16(), "nan": torch.tensor([float("nan")])},
            }
        },
        clients={7: 1, 2: 100},
        bound=0.1 + 0.2,
    )
    results = RunFolder(tmp_path / "run", config())
    results.add(RECORD)
    contexts = {client: context(client) for client in range(3)}
    contexts[1].state = kept()
    Commits(results, "base", Ledger(tmp_path / "ledger")).add(snapshot, contexts)
    commit = latest(tmp_path / "run", pytest.fail)
    assert commit is not None
    found = commit.snapshot
    assert (found.round, found.clients, found.bound) == (3, snapshot.clients, snapshot.bound)
    for before, after in (
        (snapshot.arrays, found.arrays),
        (snapshot.carried["memory"], found.carried["memory"]),
    ):
        assert list(before) == list(after)
        for name, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
            assert same_bits(tensor, after[name]), name
    others = {client: context(client) for client in range(3)}
    others[2].state = kept()  # of a round that was never committed
    commit.give_back(others)
    assert others[1].state == contexts[1].state and list(others[1].state) == list(kept())
    assert list(others[1].state["own"]) == ["z", "a"]
    assert [type(v) for v in others[1].state["seen"].values()] == [int, float, float, list, list]
    assert not others[0].state and not others[2].state
    again = RunFolder.reopened(tmp_path / "run", config(), commit.written)
    assert again.records == [RECORD]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    pair = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*pair)


def test_a_record_is_its_line() -> None:
    assert RoundRecord.from_json(json.loads(json.dumps(RECORD.as_json()))) == RECORD


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    from simulations.results import Written

    results = RunFolder(tmp_path / "run", config())
    results.add(RECORD)
    (tmp_path / "run" / "rounds.jsonl").write_text('{"round": 0}\n')
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 1: no record"):
        RunFolder.reopened(tmp_path / "run", config(), Written(13, ""))
