"""Packs on the grids: how they are formed, who is answered, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from clients.client_app import PackingApp
from fedlora.config import LaunchConfig, RunConfig
from fedlora.errors import MemoryLimitError
from fedlora.ledger import Ledger
from fedlora.rounds import HALVED
from simulations import launch
from simulations.grid import InProcessGrid, packs
from simulations.progress import Progress
from simulations.ray_grid import RayGrid
from simulations.recipe import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files to the collector
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus, of its own hooks
]
EIGHT = ("clients.number=8", "launch.pack=3", "rounds=2")
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-4")


def run(folder: Path, *changes: str, recipe: str = "tiny") -> Path:
    return launch.run(load(recipe).resolve(None, changes), folder, Progress())


def rounds(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def message(node: int, pack: Any, kind: str = "train", server_round: int = 1) -> Message:
    config = ConfigRecord({"pack": pack} if pack else {})
    return Message(RecordDict({"config": config}), node, kind, group_id=str(server_round))


def test_packs_are_formed_in_node_order_and_as_the_messages_allow() -> None:
    InProcessGrid(ClientApp(), 1)  # gives this process an identity in Flower's eyes

    def nodes(messages: list[Message]) -> list[list[int]]:
        return [[one.metadata.dst_node_id for one in pack] for pack in packs(messages)]

    assert nodes([message(node, 3) for node in (6, 2, 5, 1, 0, 4, 3)]) == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    assert nodes([message(node, 0) for node in range(3)]) == [[0], [1], [2]]
    assert nodes([message(node, "3") for node in range(2)]) == [[0], [1]]
    assert nodes([message(0, 3), message(1, 2), message(2, 3)]) == [[0, 1], [2]]
    assert nodes([message(node, 3, "evaluate") for node in range(2)]) == [[0], [1]]
    assert nodes([]) == []


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "rolora"])
def test_packs_train_what_one_by_one_trains(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without dropout; float32 sums in another order are all that differs."""
    sizes, own = [], PackingApp.train_pack
    monkeypatch.setattr(
        PackingApp,
        "train_pack",
        lambda app, sent, to: sizes.append(len(sent)) or own(app, sent, to),
    )
    images = ("clients.number=6", "clients.split=iid", "rounds=2", "train.steps=3")
    quick = (f"method={method}", "task.rows_per_group=20")
    folders = [
        run(tmp_path / f"{pack}", *images, *quick, f"launch.pack={pack}", recipe="digits")
        for pack in (1, 4)
    ]
    one, packed = (adapter(folder) for folder in folders)
    for key in one:
        assert float((one[key] - packed[key]).norm() / one[key].norm()) < 1e-4, key
    assert sizes == [4, 2] * 2
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [summary["pack"] for summary in summaries] == [1, 4]


def test_a_private_pack_is_another_release_than_its_clients_alone(tmp_path: Path) -> None:
    """Who else is in a pack decides what dropout drops, so the noise must be another too."""
    ledger = Ledger(tmp_path / "ledger")
    shared = (*EIGHT[:1], *PRIVATE, "rounds=1", f"privacy.ledger={ledger.folder}")
    tensors = []
    for number, pack in enumerate((1, 3, 4, 3), 1):
        tensors.append(adapter(run(tmp_path / f"run{number}", *shared, f"launch.pack={pack}")))
        charges = [charge.release for charge in ledger.charges(0)]
        assert len(set(charges)) == len(charges) == min(number, 3)  # the fourth is the second again
    assert all(torch.equal(tensors[1][key], tensors[3][key]) for key in tensors[1])
    assert all(event == ledger.events(0)[0] for event in ledger.events(0))


@pytest.mark.ray
@pytest.mark.parametrize("private", [pytest.param((), marks=pytest.mark.slow), PRIVATE])
def test_packs_are_the_same_bits_in_process_and_on_any_number_of_workers(
    tmp_path: Path, private: tuple[str, ...]
) -> None:
    found = []
    for backend, workers in (("inprocess", 1), ("ray", 1), ("ray", 2)):
        where = (f"launch.backend={backend}", f"launch.workers={workers}")
        folder = run(tmp_path / f"{backend}{workers}", *EIGHT, *private, *where)
        found.append((rounds(folder), adapter(folder)))
    for records, tensors in found[1:]:
        assert records == found[0][0]
        assert all(torch.equal(tensors[key], found[0][1][key]) for key in tensors)


def test_a_client_without_budget_costs_its_pack_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    target = ("privacy.unit=example", "privacy.epsilon=4.0", "privacy.delta=1e-3")
    shared = f"privacy.ledger={ledger.folder}"
    first = run(tmp_path / "first", *EIGHT, *target, shared, "rounds=1", "seed=1")
    (ledger.folder / "client-4.jsonl").write_text(
        (ledger.folder / "client-4.jsonl").read_text().replace('"steps": 5', '"steps": 5000')
    )
    for client in (0, 1, 2, 3, 5, 6, 7):
        (ledger.folder / f"client-{client}.jsonl").unlink()
    second = run(tmp_path / "second", *EIGHT, *target, shared)
    assert rounds(first)[1]["clients"] == list(range(8))
    for record in rounds(second)[1:]:
        assert record["clients"] == [0, 1, 2, 3, 5, 6, 7]
        assert [failure["client"] for failure in record["failures"]] == [4]
        assert "above the target 4" in record["failures"][0]["reason"]


def test_models_that_cannot_be_packed_train_one_by_one(tmp_path: Path) -> None:
    miss = ("clients.number=8", "adapter.name=miss", "rounds=1")
    folder = run(tmp_path / "run", *miss)
    assert json.loads((folder / "summary.json").read_text())["pack"] == 1
    with pytest.raises(Exception, match=r"launch\.pack: found 4, allowed: 1 .*ParameterDict"):
        run(tmp_path / "other", *miss, "launch.pack=4")


# --- packs that do not fit into memory ------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that sets how many clients fit; those who train alone fit if 1 does."""
    from clients import local
    from clients.cohort import Pack

    limit, packed, alone = [99], Pack.losses, local.example_losses

    def full(clients: int) -> None:
        if clients > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def losses(self: Pack, members: Any, *given: Any, **more: Any) -> Any:
        full(len(members))
        return packed(self, members, *given, **more)

    def by_itself(logits: Any, *given: Any) -> Any:
        if logits.requires_grad:
            full(1)
        return alone(logits, *given)

    monkeypatch.setattr(Pack, "losses", losses)
    monkeypatch.setattr(local, "example_losses", by_itself)
    monkeypatch.setattr("clients.private.example_losses", by_itself)
    yield lambda clients: limit.__setitem__(0, clients)


def releases(ledger: Ledger, clients: int) -> list[list[str]]:
    return [[charge.release for charge in ledger.charges(k)] for k in range(clients)]


@pytest.mark.parametrize("private", [(), PRIVATE])
@pytest.mark.parametrize(("fits", "smaller"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_pack_that_does_not_fit_is_trained_in_halves(
    tmp_path: Path, room: Any, private: tuple[str, ...], fits: int, smaller: int
) -> None:
    """The bits, the releases and the charges of packs that were smaller from the start."""
    shared = ("clients.number=7", "rounds=2", *private)
    found = []
    for name, pack, limit in (("halved", 4, fits), ("small", smaller, 99)):
        room(limit)
        folder = run(tmp_path / name, *shared, f"launch.pack={pack}")
        found.append((rounds(folder), adapter(folder), releases(Ledger(folder / "ledger"), 7)))
    (halved, tensors, charged), (small, expected, wanted) = found
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert charged == wanted
    assert [len(own) for own in charged] == [2 if private else 0] * 7
    sizes = {2: [2, 2, 2, 2, 2, 2, 1], 1: [1] * 7}[fits]
    for record in halved[1:]:
        assert record.pop("halved") == {str(k): size for k, size in enumerate(sizes)}
    for record in [halved[0], *small]:
        assert record.pop("halved") == {}
    assert halved == small


@pytest.mark.parametrize("private", [pytest.param((), marks=pytest.mark.slow), PRIVATE])
def test_a_client_that_does_not_fit_alone_fails_by_name(
    tmp_path: Path, room: Any, private: tuple[str, ...]
) -> None:
    room(0)
    folder = run(tmp_path / "run", *EIGHT, *private)
    for record in rounds(folder)[1:]:
        failures = [one for one in record["failures"] if one["stage"] == "train"]
        assert [one["client"] for one in failures] == list(range(8))
        assert failures[3]["reason"] == (
            "MemoryLimitError: CUDA out of memory; client 3 does not fit by itself: lower "
            "train.batch_size or model.max_length, or train.checkpointing"
        )
    assert releases(Ledger(folder / "ledger"), 8) == [[]] * 8  # nothing left, nothing was charged


class Notes(ClientApp):
    """Trains packs by saying so; a pack with client 5 in it fails as a whole.

    In round 2, packs of more than 2 do not fit.
    """

    def train_pack(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        clients = [int(context.node_config["partition-id"]) for context in contexts]
        if messages[0].metadata.group_id == "2" and len(messages) > 2:
            raise MemoryLimitError("CUDA out of memory")
        if 5 in clients:
            raise RuntimeError("the pack cannot be trained")
        found: list[Message | Exception] = []
        for client, one in zip(clients, messages, strict=True):
            metrics = MetricRecord({"client": client, "pack": len(messages)})
            sent = Message(RecordDict({"metrics": metrics}), reply_to=one)
            found.append(ValueError(f"client {client} is odd\nand more") if client == 1 else sent)
        return found


app = Notes()


@app.train()
def alone(message: Message, context: Context) -> Message:
    """One client by itself."""
    client = int(context.node_config["partition-id"])
    if client == 5:
        raise RuntimeError("client 5 cannot be trained")
    metrics = MetricRecord({"client": client, "pack": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@pytest.fixture(scope="module", params=["inprocess", "ray"])
def grid(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "inprocess":
        yield InProcessGrid(app, 7)
        return
    ray = RayGrid("tests.simulations.test_packs:app", 7, LaunchConfig(backend="ray", workers=2))
    yield ray
    ray.close()


def test_everybody_in_a_pack_is_answered_for_by_itself(grid: Any) -> None:
    replies = list(grid.send_and_receive([message(node, 2) for node in range(7)]))
    assert [one.metadata.src_node_id for one in replies] == list(range(7))
    reasons = {c: one.error.reason for c, one in enumerate(replies) if one.has_error()}
    assert reasons.keys() == {1, 5}, reasons
    assert replies[1].error.reason == "ValueError: client 1 is odd"
    assert replies[5].error.reason == "RuntimeError: client 5 cannot be trained"
    sizes = {
        c: int(one.content["metrics"]["pack"]) for c, one in enumerate(replies) if c not in (1, 5)
    }
    assert sizes == {0: 2, 2: 2, 3: 2, 4: 1, 6: 1}  # the pack that failed went one by one


def test_replies_say_how_many_fitted(grid: Any, caplog: pytest.LogCaptureFixture) -> None:
    replies = grid.send_and_receive([message(node, 5, server_round=2) for node in range(7)])
    sizes = {
        one.metadata.src_node_id: (one.content["metrics"]["pack"], one.content["metrics"][HALVED])
        if HALVED in one.content["metrics"]
        else None
        for one in replies
        if not one.has_error()
    }
    # 0 to 4 go as 0 to 2 and 3 to 4, then 0 to 2 as 0 to 1 and 2; 5 and 6 fit and fail, then alone
    assert sizes == {0: (2, 2), 2: (1, 1), 3: (2, 2), 4: (2, 2), 6: None}


def test_the_default_leaves_packs_for_several_workers() -> None:
    config: RunConfig = load("tiny").resolve(None, [])
    assert config.launch.pack == 0
