"""What clients keep: it lasts, it is theirs alone, and only a reply that was made moves it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor

from clients import attacks, personal
from clients.client_app import app
from clients.local import Rows
from clients.resident import Resident, resident
from fedlora.adapters import load_into
from fedlora.calibration import ClientPlan
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, WireError
from fedlora.ledger import Ledger
from fedlora.rounds import piece_of
from fedlora.wire import tensors
from simulations.grid import InProcessGrid
from simulations.protection import plan_privacy
from simulations.recipe import load
from simulations.server_app import client_config, strategy_for

torch.set_num_threads(1)

MINE = ("B", "heads")
QUICK = ("train.steps=2", "train.batch_size=4", "model.max_length=12")
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5")


class Federation:
    """A run of FedSA-LoRA whose messages are carried by hand."""

    def __init__(self, folder: Path, *changes: str, recipe: str = "tiny") -> None:
        self.config: RunConfig = load(recipe).resolve("fedsa_lora", [*QUICK, *changes])
        self.here: Resident = resident(self.config.client())
        self.strategy = strategy_for(self.config, self.here.model.scales())
        self.grid = InProcessGrid(app, self.config.clients.number)
        self.ledger = Ledger(folder / "ledger")
        self.planned: list[ClientPlan] = plan_privacy(
            self.config, self.here, self.strategy, [len(part) for part in self.here.parts]
        )

    def messages(self, server_round: int, arrays: ArrayRecord) -> list[Message]:
        told = client_config(self.config, self.here, self.planned, self.ledger)
        return list(self.strategy.configure_train(server_round, arrays, told, self.grid))

    def context(self, client: int) -> Context:
        return self.grid.contexts[client]

    @property
    def first(self) -> ArrayRecord:
        return ArrayRecord(self.here.first)


def kept(context: Context) -> dict[str, Tensor]:
    return tensors(context.state.array_records[personal.NAME])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def by_reference(
    here: Resident, config: RunConfig, client: int, server_round: int, start: dict[str, Tensor]
) -> dict[str, Tensor]:
    load_into(here.model.trained, start)
    return dict(here.train(client, server_round, config.train, ("A", "B")).tensors)


def test_each_client_goes_on_from_its_own_b_and_the_common_a(tmp_path: Path) -> None:
    """Two rounds, all tensors bit for bit those of plain training from (A, own B, own heads)."""
    fed, arrays = Federation(tmp_path, "clients.number=2"), None
    first = dict(Resident(fed.config.client()).first)
    mine = [dict(first), dict(first)]
    common = {key: value for key, value in first.items() if piece_of(key) == "A"}
    arrays = fed.first
    for server_round in (1, 2):
        replies = [app(m, fed.context(k)) for k, m in enumerate(fed.messages(server_round, arrays))]
        for client, reply in enumerate(replies):
            start = {**mine[client], **common}
            expected = by_reference(fed.here, fed.config, client, server_round, start)
            mine[client] = expected
            sent = tensors(reply.content["arrays"])
            assert same(sent, {key: expected[key] for key in common})
            assert same(kept(fed.context(client)), personal.of_pieces(expected, MINE))
        assert not same(kept(fed.context(0)), kept(fed.context(1)))
        arrays, _ = fed.strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        common = {k: v for k, v in tensors(arrays).items() if piece_of(k) == "A"}


def test_the_same_rows_with_another_b_give_another_a(tmp_path: Path) -> None:
    fed = Federation(tmp_path)
    message, fresh, moved = fed.messages(2, fed.first)[0], fed.context(0), fed.context(1)
    moved.node_config = dict(fresh.node_config)
    other = {k: v + 0.5 for k, v in personal.of_pieces(fed.here.first, MINE).items()}
    personal.keep(moved, other, MINE)
    found = [tensors(app(message, context).content["arrays"]) for context in (fresh, moved)]
    assert found[0].keys() == found[1].keys()
    assert all(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_client_measures_with_its_own(tmp_path: Path) -> None:
    fed = Federation(tmp_path)
    told = client_config(fed.config, fed.here, [], fed.ledger)
    (message, *_) = fed.strategy.configure_evaluate(1, fed.first, told, fed.grid)
    context = fed.context(message.metadata.dst_node_id)
    plain = app(message, context).content["metrics"]["loss"]
    other = {k: v + 0.5 for k, v in personal.of_pieces(fed.here.first, MINE).items()}
    personal.keep(context, other, MINE)
    before = copy.deepcopy(context.state)
    found = app(message, context).content["metrics"]["loss"]
    shard, shards = message.content["config"]["shard"], message.content["config"]["shards"]
    for values, loss in ((fed.here.first, plain), ({**fed.here.first, **other}, found)):
        fed.here.load(values)
        groups = fed.here.evaluate(shard, shards, fed.config.train).values()
        assert loss == sum(g.loss for g in groups) / sum(g.examples for g in groups)
    assert plain != found
    assert context.state == before


def test_a_reply_that_cannot_be_made_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor that of another member of a pack, which will be trained again one by one."""
    fed = Federation(tmp_path)
    messages = fed.messages(1, fed.first)[:2]
    contexts = [fed.context(client) for client in (0, 1)]
    own = attacks.sent

    def sent(config: Any, client: int, *rest: Any) -> Any:
        if client == 1:
            raise RuntimeError("no reply")
        return own(config, client, *rest)

    monkeypatch.setattr(attacks, "sent", sent)
    with pytest.raises(RuntimeError):
        app.train_pack(messages, contexts)
    with pytest.raises(RuntimeError):
        app(messages[1], contexts[1])
    assert not any(context.state for context in contexts)
    app(messages[0], contexts[0])
    assert personal.NAME in contexts[0].state


def test_a_pack_trains_each_member_from_its_own(tmp_path: Path) -> None:
    """In a model without dropout, as one by one but for rounding; twice, so that states differ."""
    fed = Federation(tmp_path, recipe="digits")
    clients, together, alone = (0, 1, 2), [], []
    for server_round in (1, 2):
        messages = fed.messages(server_round, fed.first)[:3]
        together = [copy.deepcopy(fed.context(k)) for k in clients]
        packed = app.train_pack(messages, together)
        alone = [fed.context(k) for k in clients]
        for message, context, reply, other in zip(messages, alone, packed, together, strict=True):
            assert isinstance(reply, Message)
            single = tensors(app(message, context).content["arrays"])
            pairs = [(single, tensors(reply.content["arrays"])), (kept(context), kept(other))]
            for one, many in pairs:
                assert one.keys() == many.keys()
                for key in one:
                    assert float((one[key] - many[key]).norm()) < 1e-4 * float(one[key].norm()), key
    assert not same(kept(alone[0]), kept(alone[1]))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus on its generator and hooks
def test_a_private_pack_begins_with_each_members_own(tmp_path: Path) -> None:
    """At a rate that moves nothing, what is kept is what was there."""
    fed = Federation(tmp_path, *PRIVATE, "train.learning_rate=1e-12", "train.optimizer=sgd")
    contexts, first = [fed.context(k) for k in (0, 1, 2)], personal.of_pieces(fed.here.first, MINE)
    for shift, context in enumerate(contexts[1:], 1):
        personal.keep(context, {key: value + shift for key, value in first.items()}, MINE)
    app.train_pack(fed.messages(1, fed.first)[:3], contexts)
    for shift, context in enumerate(contexts):
        for key, value in kept(context).items():
            torch.testing.assert_close(value, first[key] + shift)
        assert len(fed.ledger.events(shift)) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus on its generator and hooks
def test_another_own_start_is_another_private_release(tmp_path: Path) -> None:
    """The same noise under another B would show what B did to the gradient."""
    fed = Federation(tmp_path, *PRIVATE)
    message, context = fed.messages(1, fed.first)[0], fed.context(0)
    before = copy.deepcopy(context)
    first = tensors(app(message, context).content["arrays"])
    again = tensors(app(message, before).content["arrays"])
    assert same(first, again)
    assert len(fed.ledger.events(0)) == 1
    app(message, context)
    assert len(fed.ledger.events(0)) == 2


def test_what_belongs_to_another_model_is_refused(tmp_path: Path) -> None:
    fed = Federation(tmp_path)
    key = next(key for key in fed.here.first if piece_of(key) == "B")
    own = {**personal.of_pieces(fed.here.first, MINE), key: torch.zeros(3, 2)}
    personal.keep(fed.context(0), own, MINE)
    with pytest.raises(WireError, match=r"found \[3, 2\], allowed: \[32, 4\]"):
        app(fed.messages(1, fed.first)[0], fed.context(0))


def test_rows_held_back_never_train_and_newcomers_never_do(tmp_path: Path) -> None:
    """What trains and what is measured are all of a client's rows, each once."""
    changes = ("evaluate.personal=true", "evaluate.holdout=0.25", "clients.newcomers=1")
    fed, plain = Federation(tmp_path, *changes), Federation(tmp_path)
    assert fed.here is not plain.here
    for client in range(4):
        training, held, whole = (
            sorted(each(rows))
            for rows in (
                fed.here.rows(client),
                fed.here.held_back(client),
                plain.here.rows(client),
            )
        )
        assert sorted(training + held) == whole
        assert len(held) == round(0.25 * len(whole))
    messages = fed.messages(1, fed.first)
    assert [message.metadata.dst_node_id for message in messages] == [0, 1, 2]
    with pytest.raises(ConfigError, match="client 3 was asked to train, allowed: 0 to 2"):
        app(messages[0], fed.context(3))
    with pytest.raises(ConfigError, match="client 3 was asked to train"):
        app.train_pack(messages[:2], [fed.context(0), fed.context(3)])


def each(rows: Rows) -> list[tuple[list[int], int]]:
    """The tokens and the label of each row."""
    tokens = [rows.inputs([row])["input_ids"][0].tolist() for row in range(len(rows))]
    return list(zip(tokens, rows.labels.tolist(), strict=True))
