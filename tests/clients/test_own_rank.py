"""A client of lower rank trains what a model of that rank would: its shape, its scale, no more."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from clients import resident as module
from clients.client_app import app
from clients.measures import measured
from clients.packs import train_pack, train_private_pack
from clients.resident import Resident, Trained
from fedlora import wire
from fedlora.config import (
    AdapterConfig,
    ClientConfig,
    ClientsConfig,
    ModelConfig,
    PrivacyConfig,
    TaskConfig,
    TrainConfig,
)
from fedlora.config_evaluate import EvaluateConfig
from fedlora.ledger import Ledger
from fedlora.rounds import Factor
from simulations.grid import InProcessGrid
from tests.helpers import relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus, of its own hooks
torch.set_num_threads(1)

RANKS = (2, 8, 4)
ADAMW = TrainConfig(steps=4, batch_size=8, learning_rate=5e-3)
SGD = TrainConfig(steps=4, batch_size=8, learning_rate=0.5, optimizer="sgd", proximal=0.1)
BOTH: tuple[Factor, ...] = ("A", "B")
TRAIN: tuple[tuple[Factor, ...], ...] = (BOTH, ("B",), ("A",))


def config(rank: int | None = None, **adapter: object) -> ClientConfig:
    """With all of ``RANKS``, or of one rank."""
    ranks = {"rank": rank} if rank else {"ranks": RANKS}
    options = {"alpha": 12.0, **adapter}
    return ClientConfig(
        seed=5,
        task=TaskConfig(name="tweets"),
        clients=ClientsConfig(number=6, split="iid"),
        model=ModelConfig(name="tiny_bert", max_length=16),
        adapter=AdapterConfig.model_validate({**ranks, "options": options}),
        train=ADAMW,
        privacy=PrivacyConfig(unit="example", noise_multiplier=1.0, delta=1e-3, clip=0.5),
    )


def start(here: Resident) -> dict[str, Tensor]:
    """An adapter with no factor at zero."""
    generator = torch.Generator().manual_seed(3)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in here.first.items()
    }


@pytest.fixture
def here() -> Resident:
    found = Resident(config())
    found.load(start(found))
    return found


def alone(here: Resident, client: int, **adapter: object) -> Resident:
    """A resident whose adapter is of the client's rank, with what the client holds in it."""
    rank = here.config.adapter.rank_of(client)
    found = Resident(config(rank, **adapter))
    found.load(here.own_rank(client).cut(start(here)))
    return found


def same(found: Trained, expected: Trained) -> None:
    assert found.loss == expected.loss
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[key], tensor), key


def test_clients_have_the_recipes_ranks_in_turn() -> None:
    adapter = config().adapter
    assert [adapter.rank_of(client) for client in range(5)] == [2, 8, 4, 2, 8]
    assert (adapter.rank, config(4).adapter.rank_of(7)) == (8, 4)


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_one_by_one_it_is_a_model_of_that_rank_bit_for_bit(
    here: Resident, settings: TrainConfig, train: tuple[Factor, ...]
) -> None:
    for client in range(3):
        here.load(start(here))
        found = here.train(client, 1, settings, train)
        same(found, alone(here, client).train(client, 1, settings, train))


def test_so_are_its_steps_before_it_measures_on_its_own_rows() -> None:
    """The global adapter is measured whole; what is personal, at the client's rank."""
    asked = {"evaluate": EvaluateConfig(personal=True, fine_tune_steps=4)}
    here = Resident(config().model_copy(update=asked))
    for client in (0, 2):
        here.load(start(here))
        found = measured(here, client, 1, here.config, BOTH, {})
        own = Resident(config(here.config.adapter.rank_of(client)).model_copy(update=asked))
        own.load(here.own_rank(client).cut(start(here)))
        expected = measured(own, client, 1, own.config, BOTH, {})
        assert found["personal.loss"] == expected["personal.loss"]
        assert found["global.loss"] != expected["global.loss"]


def test_so_with_the_scale_of_rslora() -> None:
    here = Resident(config(use_rslora=True))
    here.load(start(here))
    found = here.train(0, 1, SGD, BOTH)
    same(found, alone(here, 0, use_rslora=True).train(0, 1, SGD, BOTH))
    assert here.own_rank(0).ratio == 2.0


@pytest.mark.parametrize("train", TRAIN)
def test_privately_its_own_numbers_alone_are_clipped_and_noised(
    here: Resident, train: tuple[Factor, ...]
) -> None:
    for client in (0, 2):
        here.load(start(here))
        found = here.train_privately(client, 1, config(), train, 1.0, "a")
        expected = alone(here, client).train_privately(client, 1, config(), train, 1.0, "a")
        same(found, expected)


def test_the_model_is_as_it_was_afterwards(here: Resident) -> None:
    scales, before = here.model.scales(), start(here)
    for client in (0, 2):
        here.train(client, 1, ADAMW, BOTH)
        assert here.model.scales() == scales
        for key, parameter in here.model.trained.items():
            assert torch.equal(parameter.detach(), before[key]) and parameter.grad is None


def test_and_after_a_failure(here: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> float:
        assert here.model.scales() != scales
        raise RuntimeError("in the middle")

    scales, before = here.model.scales(), start(here)
    monkeypatch.setattr(module, "train", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        here.train(0, 1, ADAMW, BOTH)
    assert here.model.scales() == scales
    assert all(torch.equal(p.detach(), before[key]) for key, p in here.model.trained.items())


def without_dropout(here: Resident) -> None:
    for layer in here.model.module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0


def close(found: Trained, expected: Trained, first: dict[str, Tensor], limit: float) -> None:
    """In float32; tensors as far as they moved."""
    assert found.examples == expected.examples
    for key, tensor in expected.tensors.items():
        assert found.tensors[key].shape == tensor.shape
        moved = tensor - first[key]
        assert relative(found.tensors[key] - first[key], moved) < limit, key


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("clients", [[0, 1, 2, 3], [2, 5]])
def test_packs_train_what_one_by_one_trains(
    here: Resident, train: tuple[Factor, ...], clients: list[int]
) -> None:
    without_dropout(here)
    here.load(start(here))
    together = train_pack(here, clients, 1, SGD, train)
    for client, found in zip(clients, together, strict=True):
        here.load(start(here))
        first = dict(here.own_rank(client).cut(start(here)))
        assert isinstance(found, Trained)
        close(found, here.train(client, 1, SGD, train), first, 2e-4)


@pytest.mark.parametrize("train", TRAIN)
def test_private_packs_too(here: Resident, train: tuple[Factor, ...]) -> None:
    without_dropout(here)
    here.load(start(here))
    private = config().model_copy(update={"train": SGD})
    names = ["a", "b", "c"]
    together = train_private_pack(here, [0, 1, 2], 1, private, train, [1.0] * 3, names)
    for client, found in enumerate(together):
        here.load(start(here))
        first = dict(here.own_rank(client).cut(start(here)))
        assert isinstance(found, Trained)
        expected = here.train_privately(client, 1, private, train, 1.0, names[client])
        close(found, expected, first, 2e-4)


def test_a_release_is_of_what_the_client_holds(here: Resident, tmp_path: Path) -> None:
    """What it lacks of the global adapter has no part in its update, so it costs nothing anew."""
    asked = {
        "fedlora": config().model_dump_json(),
        "train": "AB",
        "server-round": 1,
        "noise-multipliers": [1.0] * 6,
        "ledger": str(tmp_path),
    }
    one, grid = start(here), InProcessGrid(app, 6)
    row_7, row_2 = copy.deepcopy(one), copy.deepcopy(one)
    key = next(key for key in one if "lora_A" in key)
    row_7[key][6] += 1.0
    row_2[key][1] += 1.0
    for tensors in (one, row_7, row_2):
        content = RecordDict({"arrays": wire.record(tensors), "config": ConfigRecord(dict(asked))})
        messages = [Message(content, node, "train", group_id="1") for node in range(2)]
        assert not any(reply.has_error() for reply in grid.send_and_receive(messages))
    assert [len(Ledger(tmp_path).charges(client)) for client in range(2)] == [2, 3]
