"""One base model that stays in the process; clients are copied in and out of its adapter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import numpy
import torch
from torch import Tensor, nn

from clients.attacks import backdoored, check_task, rows_of
from clients.encoded import Encoded
from clients.frozen import FrozenBase
from clients.local import Measured, Rows, evaluate, train
from clients.own_rank import OwnRank
from clients.own_rows import holdings, measured_rows
from clients.pruned_rank import Pruning
from clients.pruning import Tail
from fedlora import wire
from fedlora.adapters import AdaptedModel, attach, load_into
from fedlora.config import ClientConfig, PrivacyConfig, TrainConfig
from fedlora.errors import ConfigError
from fedlora.models import fingerprint, load_model, move
from fedlora.rounds import FACTORS, Factor, Piece, piece_of
from fedlora.seeds import ambient, derive, numpy_generator
from fedlora.system_random import SystemRandom
from fedlora.tasks import load_task
from fedlora.tasks.task import Examples, Task
from fedlora.wire import Layout

SETTINGS = {"train": TrainConfig(), "privacy": PrivacyConfig()}  # need no other resident
KEPT_CLIENTS = 256  # encoded data sets kept in memory


@dataclass(frozen=True)
class Trained:
    """What one client brings back from a round."""

    tensors: OrderedDict[str, Tensor]
    examples: int
    loss: float


class Resident:
    """A base model with an adapter, the task, and the clients' data, built once per process."""

    def __init__(self, config: ClientConfig) -> None:
        """Load the task and the model, deal the data, draw the first adapter.

        Raises:
            ConfigError: whatever of it cannot be had as the recipe says.
        """
        self.config = config
        self.task: Task = load_task(config.task)
        check_task(config.clients, self.task)
        self.own, self.parts, self._held_back = holdings(config, self.task)
        base = load_model(config.model, len(self.task.label_names), self.task.objective)
        if len(self.task.train):
            base.encode(self.task.train.take(numpy.arange(1)))  # texts for texts, images for images
        self.fingerprint = fingerprint(base.module)
        self.model: AdaptedModel = attach(base, config.adapter, config.seed)
        if fixed := self.model.fixed():
            arrays = wire.record(fixed)
            both = wire.fingerprint(Layout.of(arrays).unpack(arrays), FACTORS)
            self.fingerprint = f"{self.fingerprint}-{both}"
        self.first: OrderedDict[str, Tensor] = OrderedDict(
            (key, parameter.detach().clone()) for key, parameter in self.model.trained.items()
        )
        self.device = device_for(config.device)
        move(self.model.module, self.device)
        self.base = FrozenBase(self.model)
        self.packable: set[tuple[Factor, ...]] = set()  # what was found fit to train in packs
        self.pruning = Pruning()  # of the message at hand
        self._data, self._held_out = Encoded(KEPT_CLIENTS), Encoded(KEPT_CLIENTS)
        self._fingerprints: dict[tuple[Factor, ...], str] = {}

    def load(
        self,
        tensors: Mapping[str, Tensor],
        kept: Sequence[Piece] = (),
        base: wire.Arrays | None = None,
    ) -> None:
        """Copy a global adapter in; pieces in ``kept`` are set to the first draw.

        ``base`` is what a rule has added to the frozen weights; see ``FrozenBase.become``.

        Raises:
            ConfigError: a key that this model does not train, or one that is missing.
        """
        fixed = {key: value for key, value in self.first.items() if piece_of(key) in kept}
        values = {**fixed, **tensors}
        if values.keys() != self.first.keys():
            odd = sorted(values.keys() ^ self.first.keys())[0]
            raise ConfigError(
                f"adapter key {odd!r} is "
                + ("missing from the message" if odd in self.first else "unknown to this model")
                + "; server and client must build the same model and adapter"
            )
        self.base.become(base)
        self.pruning = Pruning()
        load_into(self.model.trained, values)

    def first_fingerprint(self, factors: Sequence[Factor]) -> str:
        """What ``wire.fingerprint`` says of the first draw's factors."""
        key = tuple(factors)
        if key not in self._fingerprints:
            arrays = wire.record(self.first)
            self._fingerprints[key] = wire.fingerprint(Layout.of(arrays).unpack(arrays), key)
        return self._fingerprints[key]

    def train(
        self, client: int, server_round: int, config: TrainConfig, factors: Sequence[Factor]
    ) -> Trained:
        """Train one client from what was loaded; only ``factors`` and vectors move."""
        moving, rows = self.moving(factors), self.rows(client)
        stream = (self.config.seed, "client", client, "round", server_round)
        with self.as_held_by(client), ambient(*stream, "dropout"):
            loss = train(
                self.model.module,
                list(moving.values()),
                rows,
                self.task.objective,
                config,
                numpy_generator(*stream, "batches"),
                self.tail(client),
            )
            return Trained(_copies(moving), len(rows), loss)

    def train_privately(
        self,
        client: int,
        server_round: int,
        config: ClientConfig,
        factors: Sequence[Factor],
        noise_multiplier: float,
        release: str,
    ) -> Trained:
        """As ``train``, by DP-SGD.

        Noise and batches have streams of their own for each ``release``: the same noise under
        another start would show the difference of the two updates. With ``rng="os"`` both come
        from the operating system and no stream is used.
        """
        from clients.private import train_privately  # Opacus takes seconds to import

        moving, rows = self.moving(factors), self.rows(client)
        stream = (self.config.seed, "client", client, "round", server_round)
        batches, noise = self.private_streams(client, server_round, config, release)
        with self.as_held_by(client), ambient(*stream, "dropout"):
            done = train_privately(
                self.model.module,
                list(moving.values()),
                rows,
                self.task.objective,
                config.train,
                noise_multiplier=noise_multiplier,
                clip=config.privacy.clip,
                rng=batches,
                noise_generator=noise,
                tail=self.tail(client),
            )
            return Trained(_copies(moving), len(rows), done.loss)

    def own_rank(self, client: int) -> OwnRank:
        """A client's rank and scale."""
        return OwnRank.of(self.config.adapter, client, self.pruning.ranks.get(client))

    def tail(self, client: int) -> Tail | None:
        """What the message penalises in a client."""
        return self.pruning.tail(self.own_rank(client).rank)

    def as_held_by(self, client: int) -> AbstractContextManager[None]:
        """The model as this client holds it, of its own rank and scale; then as it was."""
        return self.own_rank(client).held(self.model)

    def moving(self, factors: Sequence[Factor]) -> dict[str, nn.Parameter]:
        """What trains when only ``factors`` and vectors do; the rest is frozen from here on."""
        moving = {}
        for key, parameter in self.model.trained.items():
            moves = piece_of(key) in ("heads", *factors)
            parameter.requires_grad_(moves)
            if moves:
                moving[key] = parameter
        return moving

    def stream(self, client: int, server_round: int, name: str) -> numpy.random.Generator:
        """One of a client's streams for a round."""
        return numpy_generator(self.config.seed, "client", client, "round", server_round, name)

    def private_streams(
        self, client: int, server_round: int, config: ClientConfig, release: str
    ) -> tuple[numpy.random.Generator | SystemRandom, torch.Generator | SystemRandom]:
        """Where a client's private batches and its noise come from: both follow from the release.

        The same batches in two releases would be one sample told of twice, which no accountant
        prices as two; so they are drawn anew for each, as the noise is.
        """
        if config.privacy.rng == "os":
            return SystemRandom(), SystemRandom()
        stream = (self.config.seed, "client", client, "round", server_round, "noise", release)
        noise = torch.Generator(self.device).manual_seed(derive(*stream))
        return self.stream(client, server_round, f"poisson {release}"), noise

    def evaluate(
        self, shard: int, shards: int, config: TrainConfig, client: int = 0
    ) -> dict[str, Measured]:
        """Measure what was loaded on every ``shards``-th held-out row, by group; none is empty.

        Where clients have rows of their own, on all those that ``client`` holds out; or on its
        share of its groups' rows, see ``EvaluateConfig``.
        """
        task, whose = self.task_of(client), 0 if self.own is None else client
        measured = self._measured(task)
        rows = self._held_out.rows(whose, task, lambda: self._encode(measured))
        order = measured_rows(self.config, task, measured, self.parts, client, (shard, shards))
        groups, objective = measured.groups[order], task.objective
        found = evaluate(self.model.module, rows, order, groups, objective, config)
        return {task.group_names[group]: seen for group, seen in found.items()}

    def backdoor_success(self, config: TrainConfig) -> float | None:
        """The share of held-out rows of other labels that the backdoor's trigger turns to its own.

        Of what was loaded; None where the attack is no backdoor.
        """
        examples = backdoored(self.config.clients, self._measured(self.task))
        if examples is None:
            return None
        order = numpy.arange(len(examples), dtype=numpy.int64)
        rows, groups, objective = self._encode(examples), 0 * order, self.task.objective
        (seen,) = evaluate(self.model.module, rows, order, groups, objective, config).values()
        return seen.correct / seen.examples

    def held_out(self) -> int:
        """How many rows are measured, by all clients together."""
        tasks = [self.task] if self.own is None else map(self.own.task, range(len(self.parts)))
        return sum(len(self._measured(task)) for task in tasks)

    def rows(self, client: int) -> Rows:
        """One client's encoded examples, kept for its next round.

        Raises:
            ConfigError: there is no such client.
        """
        if not 0 <= client < len(self.parts):
            raise ConfigError(f"client {client}: there are {len(self.parts)} (clients.number)")
        task = self.task_of(client)

        def encode() -> Rows:
            own = task.train.take(self.parts[client])
            return self._encode(rows_of(self.config, task, client, own))

        return self._data.rows(client, task, encode)

    def held_back(self, client: int) -> Rows:
        """One client's encoded rows that never train; nobody has touched them."""
        return self._encode(self.task_of(client).train.take(self._held_back[client]))

    def task_of(self, client: int) -> Task:
        """The task whose rows ``parts`` of a client are: what all share, or the client's own."""
        return self.task if self.own is None else self.own.task(client)

    def _measured(self, task: Task) -> Examples:
        """The held-out part that the recipe measures on."""
        return task.test if self.config.task.evaluate == "test" else task.validation

    def _encode(self, examples: Examples) -> Rows:
        """Examples as the model's inputs."""
        return Rows.of(self.model.base.encode(examples), examples)


def resident(config: ClientConfig) -> Resident:
    """This process's resident for a configuration; training settings do not rebuild it."""
    return _resident(config.model_copy(update=SETTINGS).model_dump_json())


@lru_cache(maxsize=1)
def _resident(config: str) -> Resident:
    """Build it, replacing the one before."""
    return Resident(ClientConfig.model_validate_json(config))


def _copies(parameters: Mapping[str, nn.Parameter]) -> OrderedDict[str, Tensor]:
    """Parameters as tensors on the CPU that nobody else changes."""
    return OrderedDict((k, p.detach().to("cpu", copy=True)) for k, p in parameters.items())


def device_for(name: str) -> torch.device:
    """The device of a recipe's ``device``; ``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device: found 'cuda', and torch sees no GPU; allowed: auto, cpu")
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")
