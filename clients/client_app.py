"""The Flower ``ClientApp``: messages in, local training or evaluation, messages out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from clients import attacks, measures, personal
from clients.budget import (
    Proposal,
    release_of,
    train_pack_within_budget,
    train_within_budget,
)
from clients.masked_input import MaskingApp, masked_pack
from clients.memory import within_memory
from clients.node_places import counted, heed
from clients.packs import Outcome, train_pack
from clients.partition_id import client_of, config_of, trainee
from clients.pruned_rank import Pruning
from clients.resident import Resident, Trained, resident
from fedlora import wire
from fedlora.adapters import load_into
from fedlora.config import ClientConfig
from fedlora.errors import FedloraError, PrivacyError, WireError, wrong
from fedlora.faults import begin, reach
from fedlora.records import arrays_in
from fedlora.rounds import FACTORS, PIECES, Factor, Piece
from fedlora.stopwatch import follow, turn

# entries that do not bear on an update; the adapter's numbers do, beside which its fingerprint is
UNRELATED = ("shard", "shards", "ledger", "pack", "sums", "adapter")
SMALLER = "lower train.batch_size or model.max_length, or train.checkpointing"


class PackingApp(MaskingApp):
    """A client app that can also train the clients of several messages together."""

    @masked_pack
    def train_pack(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | FedloraError]:
        """Replies to training messages of one round; who fails has its error in its place.

        The messages must differ in nothing that bears on training but whom they go to.

        Raises:
            PackError: this model's clients cannot be trained together.
            MemoryLimitError: nor can so many of them on this device; nothing was charged or sent.
            FedloraError: the messages cannot be carried out.
        """
        order = _order(messages[0], contexts)
        clients = [trainee(context, order.config) for context in contexts]
        told = dict(zip(clients, contexts, strict=True))
        order.here.pruning = Pruning.of(order.ask, order.config.adapter, told)
        starts = [personal.own(order.here, context, order.personal) for context in contexts]
        done = within_memory(
            lambda: _train_pack(order, clients, starts),
            f"a pack of {len(clients)} clients does not fit",
        )
        replies = [
            found if isinstance(found, FedloraError) else _reply(message, order, client, found)
            for message, client, found in zip(messages, clients, done, strict=True)
        ]
        # once nothing can fail any more
        for client, context, found in zip(clients, contexts, done, strict=True):
            if isinstance(found, Trained):
                _keep(order, client, context, found)
        return replies


app = PackingApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training from the arrays in the message."""
    order = _order(message, [context])
    client = trainee(context, order.config)
    here, config, server_round = order.here, order.config, order.server_round
    here.pruning = Pruning.of(order.ask, config.adapter, {client: context})
    start = personal.own(here, context, order.personal)
    load_into(here.model.trained, start)

    def work() -> Trained:
        if config.privacy.unit != "example":  # for whole clients, the server adds the noise
            turn("data")
            return here.train(client, server_round, config.train, order.factors)
        turn("privacy")
        proposal = _proposal(order, client, start)
        return train_within_budget(here, client, server_round, config, order.factors, proposal)

    done = within_memory(work, f"client {client} does not fit by itself: {SMALLER}")
    reply = _reply(message, order, client, done)
    _keep(order, client, context, done)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the arrays in the message on this client's share of the held-out examples."""
    ask = cast(ConfigRecord, message.content["config"])
    here, config = _prepare(ask)
    client = client_of(context, config)
    _load(here, message, ask)
    load_into(here.model.trained, personal.own(here, context, _personal(ask)))
    begin(int(cast(int, ask["server-round"])))
    reach("evaluation")
    shard, shards = int(cast(int, ask["shard"])), int(cast(int, ask["shards"]))
    turn("evaluation")
    heed(here.own, config, [context])
    groups = here.evaluate(shard, shards, config.train, client)
    turn("transport")
    metrics = measures.told(client, groups, here.task.objective)
    content = RecordDict(
        {
            "metrics": MetricRecord(metrics),
            "reply": ConfigRecord({"client": client, **_heeded(here)}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate("personal")
def evaluate_personally(message: Message, context: Context) -> Message:
    """Measure the arrays in the message, and what becomes of them here, on rows of one's own."""
    order = _order(message, [context])
    here, config = order.here, order.config
    client = client_of(context, config)
    own = personal.own(here, context, order.personal)
    found = measures.measured(here, client, order.server_round, config, order.factors, own)
    turn("transport")
    metrics: dict[str, int | float | list[int] | list[float]] = {**found}
    said = ConfigRecord({"client": client, **_heeded(here)})
    content = RecordDict({"metrics": MetricRecord(metrics), "reply": said})
    return Message(content=content, reply_to=message)


app.query()(counted)


@dataclass(frozen=True)
class _Order:
    """What a training message asks for, and the resident with its arrays loaded."""

    here: Resident
    config: ClientConfig
    server_round: int
    factors: list[Factor]
    ask: ConfigRecord
    tensors: Mapping[str, Tensor]
    personal: tuple[Piece, ...]
    ledgers: Mapping[int, Path]


def _order(message: Message, contexts: Sequence[Context]) -> _Order:
    """Read a training message for the clients of these contexts."""
    ask = cast(ConfigRecord, message.content["config"])
    here, config = _prepare(ask)
    server_round = int(cast(int, ask["server-round"]))
    begin(server_round)
    factors = _factors(ask, "train")
    ways = {"by_step": "by-step", "smooth": "smooth"}
    asked = {name: True for name, key in ways.items() if ask.get(key, False)}
    config = config.model_copy(update={"train": config.train.model_copy(update=asked)})
    if config.train.by_step and set(factors) != set(FACTORS):
        raise wrong("train.by_step", True, f"false where {factors[0]} alone trains")
    tensors = _load(here, message, ask)
    ledgers = heed(here.own, config, contexts)
    return _Order(here, config, server_round, factors, ask, tensors, _personal(ask), ledgers)


def _train_pack(
    order: _Order, clients: Sequence[int], starts: Sequence[Mapping[str, Tensor]]
) -> list[Outcome]:
    """Train the clients together as the order asks, each from its own, privately or not."""
    here, config, factors = order.here, order.config, order.factors
    if config.privacy.unit != "example":
        turn("data")
        return train_pack(here, clients, order.server_round, config.train, factors, starts)
    turn("privacy")
    proposals = [_proposal(order, *pair) for pair in zip(clients, starts, strict=True)]
    return train_pack_within_budget(
        here, clients, order.server_round, config, factors, proposals, starts
    )


def _reply(message: Message, order: _Order, client: int, done: Trained) -> Message:
    """What a client sends back."""
    reach("upload")
    turn("transport")
    here, own = order.here, order.here.own_rank(client)
    start = own.cut(order.tensors)
    done = here.pruning.after(order.config.adapter, client, own.rank, start, done)
    if (now := here.own_rank(client)) != own:
        start = now.cut(order.tensors)
    trained = personal.without(done.tensors, order.personal)
    tensors = attacks.sent(order.config, client, order.server_round, start, trained)
    content = RecordDict(
        {
            "arrays": wire.record(tensors),
            "metrics": MetricRecord({"num-examples": done.examples, "train_loss": done.loss}),
            "reply": ConfigRecord(
                {
                    "client": client,
                    "round": order.server_round,
                    "adapter": str(order.ask.get("adapter", "")),
                    **_heeded(here),
                }
            ),
        }
    )
    return Message(content=content, reply_to=message)


def _keep(order: _Order, client: int, context: Context, done: Trained) -> None:
    """Put into a client's context what it has of its own from now on."""
    personal.keep(context, done.tensors, order.personal)
    order.here.pruning.keep(context, client)


def _prepare(ask: ConfigRecord) -> tuple[Resident, ClientConfig]:
    """This process's resident for the run the message belongs to.

    Raises:
        WireError: the message carries no Fedlora configuration, or another base model's.
    """
    config = config_of(ask)
    turn("start-up")
    here = resident(config)
    follow(here.model)
    turn("transport")
    if ask.get("base", here.fingerprint) != here.fingerprint:
        raise WireError(
            f"this client's base model is {here.fingerprint} and the server's is {ask['base']!r}; "
            "both must load the same weights, and find the same fixed factors in them, if any"
        )
    return here, config


def _proposal(order: _Order, client: int, start: Mapping[str, Tensor]) -> Proposal:
    """What the message asks of a private client, which begins with ``start`` of its own.

    Raises:
        PrivacyError: it names no noise for this client, or no ledger.
    """
    noise, ledger = order.ask.get("noise-multipliers"), order.ask.get("ledger")
    if not isinstance(noise, list) or client >= len(noise) or not isinstance(ledger, str):
        raise PrivacyError("the message asks for privacy, and names no noise or no ledger")
    settings = {key: value for key, value in order.ask.items() if key not in UNRELATED}
    settings |= _heeded(order.here)
    tensors = {**order.here.own_rank(client).cut(order.tensors), **start}
    release = release_of(client, settings, tensors, order.here.rows(client))
    return Proposal(float(noise[client]), order.ledgers.get(client, Path(ledger)), release)


def _load(here: Resident, message: Message, ask: ConfigRecord) -> dict[str, Tensor]:
    """Copy the message's arrays in, and check factors that did not travel."""
    tensors = wire.tensors(cast(ArrayRecord, message.content["arrays"]))
    kept = _factors(ask, "kept")
    here.load(tensors, (*kept, *_personal(ask)), arrays_in(message.content).get("base"))
    if kept:
        mine = here.first_fingerprint(kept)
        if mine != ask["kept-fingerprint"]:
            raise WireError(
                f"this client's draw of factor {''.join(kept)} is {mine!r} and the server's is "
                f"{ask['kept-fingerprint']!r}; both must use one seed and one version of PEFT"
            )
    return tensors


def _heeded(here: Resident) -> dict[str, str]:
    """By its digest, what was added to the base before this work; nothing where nothing was."""
    return {"base-change": here.base.digest} if here.base.digest else {}


def _personal(ask: ConfigRecord) -> tuple[Piece, ...]:
    """The pieces that the client has of its own."""
    named = cast(list[str], ask.get("personal", []))
    return tuple(piece for piece in PIECES if piece in named)


def _factors(ask: ConfigRecord, key: str) -> list[Factor]:
    """Factor letters from a configuration entry."""
    letters = str(ask.get(key, ""))
    return [factor for factor in FACTORS if factor in letters]
