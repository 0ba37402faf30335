"""A client app that masks made-up updates, and grids that lose its replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from clients.masked_input import MaskingApp
from fedlora.lowrank import Adapter
from fedlora.rounds import RoundRecord
from fedlora.wire import Layout
from simulations.grid import InProcessGrid
from strategies.base import LoraStrategy
from tests.helpers import SCALES, random_adapter, record_of

START = random_adapter(100, dtype=torch.float32)
app = MaskingApp()


def update_of(client: int, server_round: int = 1) -> Adapter:
    """What a client trains, in float32 as everywhere."""
    return random_adapter(client + 1 + 50 * server_round, dtype=torch.float32)


def examples_of(client: int) -> int:
    """A client's examples."""
    return 3 + client % 4


@app.train()
def act(message: Message, context: Context) -> Message:
    """An update of this client's own; or whatever the message says of this client."""
    ask = message.content.config_records["config"]
    client = int(context.node_config["partition-id"])
    kind = ask.get(f"client-{client}")
    adapter = update_of(client, int(message.metadata.group_id))
    if kind == "raises":
        raise RuntimeError(f"client {client} gives up")
    if kind == "nan":
        adapter.pairs[next(iter(adapter.pairs))].B[0, 0] = float("nan")
    if kind == "far":
        adapter.pairs[next(iter(adapter.pairs))].B[0, 0] = 17.0
    arrays = record_of(adapter, str(ask["train"]))
    if kind == "frozen":
        arrays = record_of(adapter)
    examples: Any = {"many": 2**20 + 1, "none": 0, "half": 0.5}.get(str(kind), examples_of(client))
    metrics = MetricRecord({"num-examples": examples, "train_loss": 0.1 * client})
    content = {"arrays": arrays, "metrics": metrics, "reply": ConfigRecord({"client": client})}
    return Message(RecordDict({**content}), reply_to=message)


Change = Callable[[str, Message], Message | None]  # of a reply to a kind of message; None loses it


class Lossy(InProcessGrid):
    """Loses the replies in ``lost``, pairs of a message's kind and a node; or changes them.

    A second message of a kind in a round is of pass 2: ``keys``, then ``keys 2``.
    """

    def __init__(
        self, clients: int, lost: Sequence[tuple[str, int]] = (), change: Change | None = None
    ) -> None:
        super().__init__(app, clients)
        self.lost, self.change, self.seen = {*lost}, change, list[tuple[str, int]]()
        self.messages = list[Message]()

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        self.messages += messages
        for reply in super().deliver(messages, timeout):
            kind = reply.metadata.message_type.removeprefix("query.")
            node = reply.metadata.src_node_id
            self.seen.append((kind, node))
            passed = self.seen.count((kind, node))
            kind = f"{kind} {passed}" if passed > 1 else kind
            if (kind, node) in self.lost:
                continue
            found = self.change(kind, reply) if self.change else reply
            if found is not None:
                yield found


class Done:
    """What a run left."""

    def __init__(self, arrays: ArrayRecord, records: list[RoundRecord]) -> None:
        self.arrays, self.records = arrays, records

    @property
    def adapter(self) -> Adapter:
        return Layout.of(self.arrays, SCALES).unpack(self.arrays)

    @property
    def reasons(self) -> Mapping[int | None, str]:
        """Why each client of round 1 did not count; ``None`` is the round itself."""
        return {failure.client: failure.reason for failure in self.records[1].failures}


def run(strategy: LoraStrategy, grid: InProcessGrid, rounds: int = 1, **clients: str) -> Done:
    """Rounds of made-up updates from ``START``; ``client_3="nan"`` says how a client behaves."""
    records: list[RoundRecord] = []
    ask = {key.replace("_", "-"): value for key, value in clients.items()}
    result = strategy.start(
        grid,
        record_of(START),
        num_rounds=rounds,
        train_config=ConfigRecord({**ask}),
        on_round=lambda record, _: records.append(record),
    )
    return Done(result.arrays, records)
