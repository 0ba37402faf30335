"""HetLoRA's pruning: its penalty against autograd, who cuts a rank, and that it stays cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor, nn

from clients import attacks, pruned_rank
from clients.client_app import app
from clients.local import batches, example_losses, train
from clients.private import train_privately
from clients.pruned_rank import Pruning
from clients.pruning import Penalty, Tail, add_penalties, tail_norm
from clients.resident import Resident, resident
from fedlora.config import RunConfig, TrainConfig
from fedlora.errors import WireError
from fedlora.ledger import Ledger
from fedlora.ranks import unpacked
from fedlora.wire import tensors
from simulations.grid import InProcessGrid
from simulations.protection import plan_privacy
from simulations.recipe import load
from simulations.server_app import client_config, strategy_for
from tests.clients import cohort_cases, test_private_cohort
from tests.clients.cohort_cases import pack, worst
from tests.clients.private_cases import Case, bert, moved, relative
from tests.helpers import random_adapter, record_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus, of its own hooks
torch.set_num_threads(1)

SGD = TrainConfig(optimizer="sgd", learning_rate=0.3, batch_size=6, steps=5)
TAIL = Tail(1, 0.7)


def ends(values: dict[str, Tensor], kept: int) -> Tensor:
    """The sum of ``||A[kept:]|| ||B[:, kept:]||`` by names, as autograd takes it."""
    found = [
        value[kept:].norm() * values[key.replace("lora_A", "lora_B")][:, kept:].norm()
        for key, value in values.items()
        if "lora_A" in key
    ]
    return torch.stack(found).sum()


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_the_gradient_is_autograds(kept: int) -> None:
    """In float64, of clients of one stack, each with units and a weight of its own."""
    adapters = [random_adapter(k, 5) for k in range(3)]
    stack = {
        key: torch.stack([tensors(record_of(a))[key].double() for a in adapters])
        for key in tensors(record_of(adapters[0]))
    }
    tails = [Tail(kept, 0.5), None, Tail(2, 3.0)]
    leaves = {key: value.clone().requires_grad_() for key, value in stack.items()}
    losses = [
        tail.weight * ends({key: leaf[k] for key, leaf in leaves.items()}, tail.kept)
        for k, tail in enumerate(tails)
        if tail
    ]
    torch.stack(losses).sum().backward()
    found = {key: torch.ones_like(value) for key, value in stack.items()}
    add_penalties(found, stack, tails)
    for key, leaf in leaves.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert relative(found[key] - 1, expected) < 1e-14 if expected.any() else True, key
        assert torch.equal(found[key][1], torch.ones_like(found[key][1]))
        if "lora" not in key:
            assert torch.equal(found[key], torch.ones_like(found[key]))


def test_a_norm_of_zero_has_no_gradient() -> None:
    """As at first, when B is zero: A is not penalised, nor is B, and nothing is NaN."""
    values = {"x.lora_A.weight": torch.ones(1, 3, 2), "x.lora_B.weight": torch.zeros(1, 2, 3)}
    found = {key: torch.zeros_like(value) for key, value in values.items()}
    add_penalties(found, values, [Tail(1, 2.0)])
    assert not any(value.any() for value in found.values())


def trained(case: Case, config: TrainConfig, tail: Tail | None) -> Tensor:
    before = case.values()
    rng = numpy.random.default_rng(7)
    train(case.module, case.parameters, case.rows, "classify", config, rng, tail)
    parts = [(p - s).flatten() for p, s in zip(case.values(), before, strict=True)]
    case.put(before)
    return torch.cat(parts)


def by_autograd(case: Case, config: TrainConfig, tail: Tail) -> Tensor:
    """Steps of torch's SGD on the loss and the penalty, differentiated as one."""
    before, names = case.values(), {id(p): n for n, p in case.module.named_parameters()}
    optimizer = torch.optim.SGD(case.parameters, lr=config.learning_rate)
    case.module.train()
    for picked in batches(len(case.rows), config, numpy.random.default_rng(7)):
        logits = case.module(**case.rows.inputs(picked)).logits
        loss = example_losses(logits, {}, case.rows.labels[picked], "classify").mean()
        held = {names[id(p)]: p for p in case.parameters}
        optimizer.zero_grad()
        (loss + tail.weight * ends(held, tail.kept)).backward()
        if config.clip_gradient:
            nn.utils.clip_grad_norm_(case.parameters, config.clip_gradient)
        optimizer.step()
    parts = [(p - s).flatten() for p, s in zip(case.values(), before, strict=True)]
    case.put(before)
    return torch.cat(parts)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_steps_are_those_of_the_whole_objective(clip: float) -> None:
    case, config = bert(), SGD.model_copy(update={"clip_gradient": clip})
    found = trained(case, config, TAIL)
    assert relative(found, by_autograd(case, config, TAIL)) < 1e-12  # float64 leaves about 1e-15
    assert relative(found, trained(case, config, None)) > 1e-2
    assert torch.equal(trained(case, config, None), trained(case, config, Tail(1, 0.0)))


def test_packs_equal_the_loops() -> None:
    """Three clients of several sizes, each with a tail of its own."""
    case, tails = pack("tiny_bert", [12, 5, 16]), [Tail(1, 0.7), None, Tail(1, 2.0)]
    config = SGD.model_copy(update={"batch_size": 4, "steps": 0, "epochs": 3})
    expected = [one_of(case, k, config, tail) for k, tail in enumerate(tails)]
    members = [replace(m, tail=t) for m, t in zip(case.members(), tails, strict=True)]
    found = cohort_cases.train_together(
        case.module, dict(case.trained), members, "classify", config
    )
    assert worst(found.tensors, expected) < 1e-9
    plain = cohort_cases.together(case, config)
    assert worst(plain.tensors, expected) > 1e-3


def one_of(case: cohort_cases.Pack, client: int, config: TrainConfig, tail: Tail | None) -> Any:
    first, parameters = case.start(), list(case.trained.values())
    rng = cohort_cases.numpy_generator(0, "batches", client)
    train(case.module, parameters, case.rows[client], "classify", config, rng, tail)
    end = case.start()
    cohort_cases.load_into(case.trained, first)
    return end


def test_privately_it_acts_after_the_noise() -> None:
    """One step: what it adds is its own gradient whole, whatever the clip and the noise."""
    case, config = bert(), SGD.model_copy(update={"steps": 1})

    def step(tail: Tail | None, noise: float) -> Tensor:
        return moved(case, config, clip=0.01, noise=noise, tail=tail)

    held = dict(zip(names_of(case), case.parameters, strict=True))
    gradients = torch.autograd.grad(ends(held, 1), case.parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(held.values(), gradients, strict=True)
    ]
    expected = -config.learning_rate * 5.0 * torch.cat([part.flatten() for part in parts])
    for noise in (0.0, 2.0):
        assert relative(step(Tail(1, 5.0), noise) - step(None, noise), expected) < 1e-9


def names_of(case: Case) -> list[str]:
    names = {id(p): name for name, p in case.module.named_parameters()}
    return [names[id(p)] for p in case.parameters]


def test_private_packs_equal_one_by_one() -> None:
    config = SGD.model_copy(update={"batch_size": 4, "learning_rate": 0.1})
    case, noise = pack("tiny_bert", [12, 5, 16]), [1.0, 0.0, 0.5]
    plain = test_private_cohort.members(case, noise)
    tails = [Tail(1, 0.7), None, Tail(1, 2.0)]
    given = [replace(m, tail=tail) for m, tail in zip(plain, tails, strict=True)]
    found = test_private_cohort.together(case, config, 0.5, given)
    expected, first = [], case.start()
    for client, tail in enumerate(tails):
        train_privately(
            case.module,
            list(case.trained.values()),
            case.rows[client],
            "classify",
            config,
            noise_multiplier=noise[client],
            clip=0.5,
            rng=test_private_cohort.poisson(client),
            noise_generator=test_private_cohort.noise_of(client),
            tail=tail,
        )
        expected.append(case.start())
        cohort_cases.load_into(case.trained, first)
    assert worst(found.tensors, expected) < 1e-9
    other = test_private_cohort.together(
        case, config, 0.5, test_private_cohort.members(case, noise)
    )
    assert worst(other.tensors, expected) > 1e-3


def test_nothing_is_looked_up_without_a_tail() -> None:
    case = bert()
    for parameter in case.parameters:
        parameter.grad = torch.zeros_like(parameter)
    Penalty(case.module, case.parameters, None).add()
    assert not any(parameter.grad.any() for parameter in case.parameters)


@pytest.mark.parametrize(
    ("gamma", "rank", "kept"),
    [
        (0.5, 8, 4),
        (0.99, 8, 7),
        (0.5, 3, 1),
        (0.29, 100, 29),
        (0.0, 8, 1),
        (0.9, 1, 1),
        (1.0, 8, 8),
    ],
)
def test_what_is_kept_by_hand(gamma: float, rank: int, kept: int) -> None:
    found = Pruning(gamma, 1.0)
    assert found.kept(rank) == kept
    assert found.tail(rank) == (Tail(kept, 1.0) if kept < rank else None)


# From here on, through the client app.

QUICK = ("train.steps=2", "train.batch_size=4", "model.max_length=12", "adapter.ranks=[4]")
PRUNES = ("options.gamma=0.5", "options.penalty=50.0", "train.optimizer=sgd")
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5")


class Federation:
    """A run of HetLoRA whose messages are carried by hand."""

    def __init__(self, folder: Path, *changes: str) -> None:
        self.config: RunConfig = load("tiny").resolve("hetlora", [*QUICK, *changes])
        self.here: Resident = resident(self.config.client())
        for layer in self.here.model.module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        self.strategy = strategy_for(self.config, self.here.model.scales())
        self.grid = InProcessGrid(app, self.config.clients.number)
        self.ledger = Ledger(folder / "ledger")
        self.planned = plan_privacy(
            self.config, self.here, self.strategy, [len(part) for part in self.here.parts]
        )

    def messages(self, server_round: int, arrays: ArrayRecord) -> list[Message]:
        told = client_config(self.config, self.here, self.planned, self.ledger)
        return list(self.strategy.configure_train(server_round, arrays, told, self.grid))

    def context(self, client: int) -> Context:
        return self.grid.contexts[client]

    def start(self, last: float = 1.0) -> ArrayRecord:
        """No factor at zero; the last two units of B times ``last``."""
        generator, found = torch.Generator().manual_seed(3), {}
        for key, value in self.here.first.items():
            found[key] = value + 0.1 * torch.randn(value.shape, generator=generator)
            if "lora_B" in key:
                found[key][:, 2:] *= last
        return ArrayRecord(found)


def rank_in(reply: Message) -> int:
    found = {
        value.shape[0] if "lora_A" in key else value.shape[1]
        for key, value in tensors(reply.content["arrays"]).items()
        if "lora" in key
    }
    (rank,) = found
    return rank


def kept_rank(context: Context) -> object:
    if pruned_rank.NAME not in context.state:
        return None
    return context.state.config_records[pruned_rank.NAME]["rank"]


@pytest.mark.parametrize("private", [(), PRIVATE])
def test_whose_units_shrink_is_cut_and_stays_cut(tmp_path: Path, private: tuple[str, ...]) -> None:
    """From 4 to 2 to 1, and never below; the other's, which begin at zero, grow."""
    fed = Federation(tmp_path, *PRUNES, *private, "train.learning_rate=0.01")
    shrinking, growing = fed.start(), fed.start(last=0.0)
    for server_round, expected in ((1, 2), (2, 1), (3, 1)):
        reply = app(fed.messages(server_round, shrinking)[0], fed.context(0))
        assert (rank_in(reply), kept_rank(fed.context(0))) == (expected, expected)
    for server_round in (1, 2):
        reply = app(fed.messages(server_round, growing)[1], fed.context(1))
        assert (rank_in(reply), kept_rank(fed.context(1))) == (4, None)
    reply = app(fed.messages(4, growing)[0], fed.context(0))
    assert rank_in(reply) == 1


def test_its_change_is_that_of_the_units_it_keeps(tmp_path: Path) -> None:
    """What the server reads is ``s B A`` of the first two units that it trained at rank 4."""
    fed = Federation(tmp_path, *PRUNES, "train.learning_rate=0.01")
    start = fed.start()
    reply = app(fed.messages(1, start)[0], fed.context(0))
    fed.here.load(tensors(start))
    fed.here.pruning = Pruning(0.5, 50.0)
    done = fed.here.train(0, 1, fed.config.train, ("A", "B")).tensors
    assert tail_norm(done, 2) < tail_norm(tensors(start), 2)
    layout = fed.strategy.prepare(start)
    shared = layout.unpack(start)
    found = unpacked(reply.content["arrays"], layout, ("A", "B"), shared)
    mine = layout.unpack(ArrayRecord(done))
    for name, pair in found.pairs.items():
        own = mine.pairs[name]
        assert relative(pair.B @ pair.A, own.B[:, :2] @ own.A[:2]) < 1e-6
        assert not pair.A[2:].any() and not pair.B[:, 2:].any()
    for name, vector in found.vectors.items():
        assert torch.equal(vector, mine.vectors[name])


def test_a_cut_client_trains_as_one_of_that_rank(tmp_path: Path) -> None:
    fed = Federation(tmp_path, *PRUNES[:1], "train.learning_rate=0.01")
    start = fed.start(last=0.0)
    fed.context(0).state[pruned_rank.NAME] = ConfigRecord({"rank": 3})
    message = fed.messages(1, start)[0]
    found = tensors(app(message, fed.context(0)).content["arrays"])
    fed.here.load(tensors(start))
    fed.here.pruning = Pruning(0.5, 0.0, {0: 3})
    expected = fed.here.train(0, 1, fed.config.train, ("A", "B")).tensors
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert {len(value) for key, value in found.items() if "lora_A" in key} == {3}


def test_packs_prune_as_one_by_one_does(tmp_path: Path) -> None:
    fed = Federation(tmp_path, *PRUNES, "train.learning_rate=0.01", "adapter.ranks=[4, 2]")
    fed.context(0).state[pruned_rank.NAME] = ConfigRecord({"rank": 3})
    fed.context(2).state[pruned_rank.NAME] = ConfigRecord({"rank": 1})
    start, nodes = fed.start(), [0, 1, 2]
    alone = copy.deepcopy([fed.context(node) for node in nodes])
    messages = fed.messages(1, start)[:3]
    one = [app(message, context) for message, context in zip(messages, alone, strict=True)]
    together = app.train_pack(messages, [fed.context(node) for node in nodes])
    for own, other, node in zip(one, together, nodes, strict=True):
        assert isinstance(other, Message)
        assert rank_in(own) == rank_in(other) == 1
        assert kept_rank(alone[node]) == kept_rank(fed.context(node)) == 1
        mine, theirs = (tensors(reply.content["arrays"]) for reply in (own, other))
        assert all(relative(theirs[key], mine[key]) < 1e-3 for key in mine)


def test_a_reply_that_cannot_be_made_cuts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = Federation(tmp_path, *PRUNES, "train.learning_rate=0.01")
    messages = fed.messages(1, fed.start())[:2]
    own = attacks.sent

    def sent(config: Any, client: int, *rest: Any) -> Any:
        if client == 1:
            raise RuntimeError("no reply")
        return own(config, client, *rest)

    monkeypatch.setattr(attacks, "sent", sent)
    with pytest.raises(RuntimeError):
        app.train_pack(messages, [fed.context(0), fed.context(1)])
    with pytest.raises(RuntimeError):
        app(messages[1], fed.context(1))
    assert not any(fed.context(client).state for client in (0, 1))
    app(messages[0], fed.context(0))
    assert kept_rank(fed.context(0)) == 2


def test_one_clients_rank_is_not_anothers(tmp_path: Path) -> None:
    """Nor that of a message which asks for no pruning, whatever the context holds."""
    fed = Federation(tmp_path, *PRUNES, "train.learning_rate=0.01")
    start = fed.start()
    app(fed.messages(1, start)[0], fed.context(0))
    assert fed.here.own_rank(0).rank == 2
    plain = Federation(tmp_path, "train.optimizer=sgd", "train.learning_rate=0.01")
    message = plain.messages(1, start)[0]
    assert "prune" not in message.content["config"]
    reply = app(message, fed.context(0))
    assert (rank_in(reply), fed.here.pruning) == (4, Pruning())
    assert kept_rank(fed.context(0)) == 2


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian"])
def test_an_attacker_prunes_too(tmp_path: Path, attack: str) -> None:
    changes = ("clients.attackers=1", f"clients.attack={attack}", "train.learning_rate=0.01")
    fed = Federation(tmp_path, *PRUNES, *changes)
    found = {rank_in(app(m, fed.context(k))) for k, m in enumerate(fed.messages(1, fed.start()))}
    assert found == {2}


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_another_runs_context_is_refused(tmp_path: Path, rank: int) -> None:
    fed = Federation(tmp_path, *PRUNES)
    fed.context(0).state[pruned_rank.NAME] = ConfigRecord({"rank": rank})
    with pytest.raises(WireError, match=rf"own rank: found {rank}, allowed: 1 to 4"):
        app(fed.messages(1, fed.start())[0], fed.context(0))
