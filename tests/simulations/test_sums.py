"""Sums on workers: the server's result to rounding, one bit pattern wherever they are added."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, RoundRecord
from fedlora.wire import Layout, size
from simulations import launch
from simulations.grid import InProcessGrid, LocalGrid
from simulations.progress import Progress
from simulations.ray_grid import RayGrid
from simulations.recipe import load
from strategies import ClientPrivacy, FedAvg, LoraFair, LoraStrategy
from strategies.adding import Totals
from tests.helpers import SCALES, VECTORS, bits, build, difference, random_adapter, record_of

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its files

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "ffa_lora": ("ffa_lora", {}),
    "ffa_lora, A drawn by clients": ("ffa_lora", {"send_frozen": False}),
    "lora_fair": ("lora_fair", {}),
    "lora_fair, no ridge": ("lora_fair", {"ridge": 0.0}),
    "rolora": ("rolora", {}),
    "fedsvd": ("fedsvd", {}),
}
app = ClientApp()


@app.train()
def act(message: Message, context: Context) -> Message:
    """Random factors of this client's own; or whatever the message says of this client."""
    ask = message.content.config_records["config"]
    client = int(context.node_config["partition-id"])
    kind, dtype = ask.get(f"client-{client}"), getattr(torch, str(ask["dtype"]))
    if kind == "raises":
        raise RuntimeError(f"client {client} gives up")
    adapter = random_adapter(client + 1 + 50 * int(message.metadata.group_id), dtype=dtype)
    if kind == "nan":
        adapter.pairs[next(iter(adapter.pairs))].B[0, 0] = float("nan")
    if kind == "long":
        adapter.pairs[next(iter(adapter.pairs))].B.mul_(1e9)
    arrays = record_of(adapter, str(ask["train"]))
    if kind == "frozen":
        arrays = record_of(adapter)
    if kind == "short":
        del arrays[next(iter(VECTORS))]
    examples = {"negative": -1.0, "many": 1e12}.get(str(kind), 3 + client % 4)
    said = client - 1 if kind == "another" else client
    content = RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"num-examples": examples, "train_loss": 0.1 * client}),
            "reply": ConfigRecord({"client": said}),
        }
    )
    return Message(content, reply_to=message)


@dataclass
class Done:
    """What a run left."""

    arrays: ArrayRecord
    records: list[RoundRecord]

    @property
    def adapter(self) -> Adapter:
        return Layout.of(self.arrays, SCALES).unpack(self.arrays)

    def told(self, number: int = 1) -> dict[str, Any]:
        """A round's record but for what differs by design."""
        record = self.records[number].as_json()
        return {
            k: v for k, v in record.items() if not k.startswith(("seconds", "aggregation_error"))
        }


def run(
    strategy: LoraStrategy,
    grid: LocalGrid | int = 7,
    pack: int = 3,
    rounds: int = 1,
    dtype: str = "float64",
    **clients: str,
) -> Done:
    records: list[RoundRecord] = []
    if isinstance(grid, int):
        grid = InProcessGrid(app, grid)
    ask = {key.replace("_", "-"): value for key, value in clients.items()}
    result = strategy.start(
        grid,
        record_of(random_adapter(100, dtype=getattr(torch, dtype))),
        num_rounds=rounds,
        train_config=ConfigRecord({"pack": pack, "dtype": dtype, **ask}),
        on_round=lambda record, _: records.append(record),
    )
    return Done(result.arrays, records)


def strategy_of(rule: str, sums: str = "workers", **more: Any) -> LoraStrategy:
    method, options = RULES[rule]
    return build(method, **options, fraction_evaluate=0.0, sums=sums, **more)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pack", [1, 3])
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("float64", 1e-12)])
def test_sums_are_the_servers_merge(rule: str, pack: int, dtype: str, allowed: float) -> None:
    summed = run(strategy_of(rule), pack=pack, dtype=dtype)
    served = run(strategy_of(rule, "server"), pack=pack, dtype=dtype)
    assert difference(summed.adapter, served.adapter) < allowed
    assert summed.told() == served.told()
    assert summed.records[1].merged and summed.records[1].bytes_up > 0
    assert summed.records[1].aggregation_error is None
    assert served.records[1].aggregation_error is not None


BAD = {
    "client_8": "long", "client_9": "many",
    "client_0": "raises", "client_2": "nan", "client_3": "short", "client_4": "negative",
}  # fmt: skip


@pytest.mark.parametrize("rule", ["fedavg", "ffa_lora", "lora_fair"])
def test_a_bad_client_costs_itself_alone_and_is_named(rule: str) -> None:
    summed, served = (run(strategy_of(rule, sums), 10, **BAD) for sums in ("workers", "server"))
    assert summed.records[1].clients == (1, 5, 6, 7)
    reasons = {failure.client: failure.reason for failure in summed.records[1].failures}
    assert reasons == {failure.client: failure.reason for failure in served.records[1].failures}
    assert "(max_norm)" in reasons[8] and "(max_examples)" in reasons[9]
    assert reasons[2] == "array 'base_model.model.encoder.query.lora_B.weight' holds values " + (
        "that are not finite"
    )
    assert difference(summed.adapter, served.adapter) < 1e-12
    assert summed.records[1].train_loss == served.records[1].train_loss


def test_who_sends_a_frozen_factor_or_says_to_be_another_is_left_out() -> None:
    for options in ({}, {"send_frozen": False}):
        strategy = build("ffa_lora", fraction_evaluate=0.0, sums="workers", **options)
        done = run(strategy, client_1="frozen", client_5="another")
        reasons = {failure.client: failure.reason for failure in done.records[1].failures}
        assert reasons.keys() == {1, 5}
        assert "differs from the shared draw" in reasons[1]
        assert reasons[5] == "says it is client 4, and is 5"


def test_too_few_good_clients_leave_the_adapter() -> None:
    everybody = {f"client_{client}": "raises" for client in range(6)}
    done = run(strategy_of("fedavg", min_train_nodes=2), **everybody)
    assert not done.records[1].merged
    assert done.records[1].failures[-1].reason.startswith("1 good replies, 2 needed")
    assert bits(done.arrays) == bits(record_of(random_adapter(100)))


class Backwards(InProcessGrid):
    """Packs come in the opposite order, as from workers of unequal speed."""

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        packs: dict[int, list[Message]] = {}
        for place, reply in enumerate(super().deliver(messages, timeout)):
            packs.setdefault(place // 3, []).append(reply)
        for place in sorted(packs, reverse=True):
            yield from packs[place]


@pytest.mark.parametrize("rule", ["fedavg", "lora_fair"])
def test_the_order_of_arrival_changes_no_bit(rule: str) -> None:
    plain = run(strategy_of(rule), InProcessGrid(app, 11))
    other = run(strategy_of(rule), Backwards(app, 11))
    assert bits(plain.arrays) == bits(other.arrays)
    assert plain.told() == other.told()


class Counting(InProcessGrid):
    """Counts the bytes that reach the server, and those it holds after each stage."""

    def __init__(self, clients: int) -> None:
        super().__init__(app, clients)
        self.kept, self.totals = 0, list[int]()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.kept = max(self.kept, sum(map(_size, replies)))
        return replies

    def take_sums(self) -> Totals:
        totals = super().take_sums()
        self.totals.append(sum(tensor.nbytes for tensor in (totals.sums or {}).values()))
        return totals


def _size(reply: Message) -> int:
    return sum(map(size, reply.content.array_records.values())) if reply.has_content() else 0


@pytest.mark.parametrize("rule", ["fedavg", "ffa_lora", "lora_fair"])
def test_what_the_server_holds_does_not_grow_with_the_clients(rule: str) -> None:
    held = {}
    for clients in (10, 200):
        for sums in ("server", "workers"):
            grid = Counting(clients)
            run(strategy_of(rule, sums), grid, pack=5)
            held[sums, clients] = grid.kept + sum(grid.totals)
    assert held["workers", 10] == held["workers", 200] > 0
    assert held["server", 200] == 20 * held["server", 10]


def test_updates_are_let_go_when_the_next_stage_begins() -> None:
    grid = InProcessGrid(app, 7)
    run(strategy_of("fedavg"), grid)
    assert not grid._reducer._held  # one pass is enough
    run(strategy_of("lora_fair"), grid)
    assert sum(map(len, grid._reducer._held.values())) == 7
    run(strategy_of("lora_fair", "server"), grid)
    assert not grid._reducer._held


class Plain(LoraStrategy):
    """A rule that says nothing of sums."""

    def plan(self, server_round: int) -> LocalPlan:
        return LocalPlan()

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        return GlobalState(updates[0].adapter, state.round + 1)


def test_what_needs_single_updates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sums: found 'workers', allowed: 'server': Plain "):
        Plain(sums="workers")
    with pytest.raises(ConfigError, match=r"allowed: 'server': LoraFair with these options"):
        LoraFair(solver="cosine_sgd", sums="workers")
    with pytest.raises(ConfigError, match=r"allowed: 'server': LoraFair with these options"):
        LoraFair(corrects="A", sums="workers")
    privacy = ClientPrivacy(noise_multiplier=1.0, clip=1.0, clients=4)
    with pytest.raises(ConfigError, match=r"allowed: 'server': client-level privacy"):
        FedAvg(client_privacy=privacy, sums="workers")
    with pytest.raises(ConfigError, match=r"sums: found 'somewhere'"):
        FedAvg(sums=cast(Any, "somewhere"))

    class Other:
        """A grid of somebody else's."""

    with pytest.raises(ConfigError, match=r"allowed: 'server' on Flower's own runtime"):
        FedAvg(sums="workers").start(cast(Any, Other()), record_of(random_adapter(1)))


class Murderous(RayGrid):
    """Loses a worker between the two passes of the first round."""

    lost = False

    def sum_again(self, token: str, told: ArrayRecord) -> Totals:
        if not self.lost:
            self.lost = True
            ray.kill(self._hands[0].actor)
        return super().sum_again(token, told)


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_lost_between_the_passes_costs_the_round_and_no_more() -> None:
    config = LaunchConfig(backend="ray", workers=1)
    grid = Murderous("tests.simulations.test_sums:app", 7, config)
    try:
        done = run(strategy_of("lora_fair"), grid, rounds=2)
        plain = run(strategy_of("lora_fair"), grid, rounds=1)
    finally:
        grid.close()
    assert [record.merged for record in done.records] == [False, False, True]
    reason = "a worker was lost between the two passes, and with it the updates of clients "
    assert done.records[1].failures[-1].reason.startswith(reason + "0, 1, 2, 3, 4, 5, 6")
    here = run(strategy_of("lora_fair"), rounds=1)
    assert bits(plain.arrays) == bits(here.arrays)


def bytes_of(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("method", ["ffa_lora", "lora_fair"])
def test_the_same_bits_in_process_and_on_any_number_of_workers(tmp_path: Path, method: str) -> None:
    changes = ["clients.number=8", "launch.pack=3", "rounds=2", "launch.sums=workers"]
    found = []
    for backend, workers in (("inprocess", 1), ("ray", 1), ("ray", 2)):
        where = [f"launch.backend={backend}", f"launch.workers={workers}"]
        config = load("tiny").resolve(method, [*changes, *where])
        folder = launch.run(config, tmp_path / f"{backend}{workers}", Progress())
        found.append(bytes_of(folder))
    assert found[0] == found[1] == found[2]
    assert [record["merged"] for record in found[0][0]] == [False, True, True]
    assert [record["aggregation_error"] for record in found[0][0]] == [None] * 3
