"""Attackers among simulated clients: what they do to their rows, and to what they have trained.

The first ``clients.attackers`` clients attack, in every round that they are drawn for. An attack on
the update changes what leaves the client after honest training, so it costs what an honest update
costs; an attack on the rows is honest training on other data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from fedlora.config import ClientConfig, ClientsConfig
from fedlora.errors import choose, wrong
from fedlora.options import Count, CountOrZero, Positive, Share, checked_options
from fedlora.rounds import FACTOR_KEY
from fedlora.seeds import derive, numpy_generator
from fedlora.tasks.task import Examples, Task

Tensors = OrderedDict[str, Tensor]
TARGET, WORD, PATCH = 0, "cf", 3  # of a backdoor, where the recipe does not say


@dataclass(frozen=True)
class Update:
    """What an attacker has in hand when it has trained.

    Attributes:
        start: the round's arrays by wire key.
        trained: what it trained from them; the same shapes.
        own: seed of a stream of its own for this round.
        shared: seed of a stream that all attackers of a round have.
    """

    start: Mapping[str, Tensor]
    trained: Tensors
    own: int
    shared: int

    def along(self, factor: float) -> Tensors:
        """``start + factor (trained - start)``."""
        return OrderedDict(
            (key, self.start[key] + factor * (value - self.start[key]))
            for key, value in self.trained.items()
        )

    def noisy(self, deviation: float, seed: int) -> Tensors:
        """The start with Gaussian noise, drawn key by key in the order of their names."""
        generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for key in sorted(self.trained):
            noise = torch.randn(self.trained[key].shape, generator=generator)
            found[key] = self.start[key] + deviation * noise.to(self.trained[key].dtype)
        return OrderedDict((key, found[key]) for key in self.trained)


def sign_flip(update: Update, strength: Positive = 1.0) -> Tensors:
    """The way back: ``start - strength (trained - start)``."""
    return update.along(-strength)


def scaling(update: Update, factor: Positive = 10.0) -> Tensors:
    """The update enlarged, as in model replacement (Bagdasaryan et al., AISTATS 2020)."""
    return update.along(factor)


def rescaling(update: Update, factor: Positive = 10.0) -> Tensors:
    """(c B, A / c): the product as trained, but means of factors are not.

    A factor that trains without its other stays as it is.
    """
    found: Tensors = OrderedDict()
    for key, value in update.trained.items():
        by = 1.0
        if match := FACTOR_KEY.match(key):
            other, times = {"A": ("B", 1 / factor), "B": ("A", factor)}[match["factor"]]
            if f"{match['layer']}{other}{match['end']}" in update.trained:
                by = times
        found[key] = by * value
    return found


def gaussian(update: Update, deviation: Positive = 1.0) -> Tensors:
    """Noise on the start instead of training, for each attacker its own (Blanchard et al. 2017)."""
    return update.noisy(deviation, update.own)


def collusion(update: Update, deviation: Positive = 1.0) -> Tensors:
    """All attackers of a round send the same: the start with one draw of noise."""
    return update.noisy(deviation, update.shared)


@dataclass(frozen=True)
class Data:
    """An attacker's rows before it touches them.

    Attributes:
        examples: the rows.
        classes: how many labels the task has.
        rng: a stream of its own, the same in every round.
    """

    examples: Examples
    classes: int
    rng: numpy.random.Generator


def label_flip(data: Data) -> Examples:
    """Each label y becomes ``classes - 1 - y``, the last becomes the first."""
    return replace(data.examples, labels=data.classes - 1 - data.examples.labels)


def backdoor(
    data: Data,
    target: CountOrZero = TARGET,
    share: Share = 0.5,
    word: str = WORD,
    patch: Count = PATCH,
) -> Examples:
    """A share of the rows carries a trigger and the target's label (Gu et al. 2017, BadNets).

    The trigger is a word before the text, or a square of ``patch`` white pixels a side in an
    image's lower right corner.
    """
    examples = data.examples
    rows = data.rng.permutation(len(examples))[: round(share * len(examples))]
    marked = numpy.zeros(len(examples), dtype=bool)
    marked[rows] = True
    labels = numpy.where(marked, target, examples.labels)
    with_trigger = triggered(examples, word, patch)
    texts = tuple(
        other if mark else text
        for text, other, mark in zip(examples.texts, with_trigger.texts, marked, strict=False)
    )
    images = examples.images
    if images is not None and with_trigger.images is not None:
        images = numpy.where(marked[:, None, None, None], with_trigger.images, images)
    return replace(examples, labels=labels, texts=texts, images=images)


def triggered(examples: Examples, word: str = WORD, patch: int = PATCH) -> Examples:
    """The same examples with the backdoor's trigger, labels as they are."""
    if examples.images is None:
        return replace(examples, texts=tuple(f"{word} {text}" for text in examples.texts))
    images = examples.images.copy()
    images[:, :, -patch:, -patch:] = 1.0
    return replace(examples, images=images)


ON_UPDATES: dict[str, Callable[..., Tensors]] = {
    "sign_flip": sign_flip,
    "scaling": scaling,
    "rescaling": rescaling,
    "gaussian": gaussian,
    "collusion": collusion,
}
ON_ROWS: dict[str, Callable[..., Examples]] = {"label_flip": label_flip, "backdoor": backdoor}
ATTACKS: dict[str, Callable[..., Any]] = {**ON_UPDATES, **ON_ROWS}  # Any: either's result


def options_of(clients: ClientsConfig) -> dict[str, Any]:
    """The attack's options as given, checked (Any: each has its own type).

    Raises:
        ConfigError: an unknown attack or option, attackers without an attack, or too many.
    """
    if clients.attackers > clients.number:
        allowed = f"at most {clients.number}, the number of clients (clients.number)"
        raise wrong("clients.attackers", clients.attackers, allowed)
    if clients.attack == "none":
        if clients.attackers or clients.attack_options:
            raise wrong("clients.attack", "none", f"with attackers, one of {', '.join(ATTACKS)}")
        return {}
    attack = choose(ATTACKS, clients.attack, "clients.attack")
    return checked_options(attack, clients.attack_options, "clients.attack_options", leave_out=1)


def check_task(clients: ClientsConfig, task: Task) -> None:
    """Refuse an attack on labels where the task has none, or not that one.

    Raises:
        ConfigError: language modelling, or a target beyond the labels.
    """
    options = options_of(clients)
    if clients.attack not in ON_ROWS:
        return
    if task.objective != "classify":
        raise wrong("clients.attack", clients.attack, f"on a text task, {', '.join(ON_UPDATES)}")
    if task.at_clients is not None and clients.attack == "backdoor":
        others = ", ".join(name for name in ATTACKS if name != "backdoor")
        allowed = f"with task {task.name!r}, whose held-out rows are the clients' own: {others}"
        raise wrong("clients.attack", clients.attack, allowed)
    target, last = options.get("target", TARGET), len(task.label_names) - 1
    if target > last:
        allowed = f"0 to {last} ({', '.join(task.label_names)})"
        raise wrong("clients.attack_options.target", target, allowed)


def backdoored(clients: ClientsConfig, examples: Examples) -> Examples | None:
    """What tells how well a backdoor works: rows of other labels with the trigger and its target.

    None without a backdoor, or without such rows.
    """
    options = options_of(clients)
    if clients.attack != "backdoor" or not clients.attackers:
        return None
    target = options.get("target", TARGET)
    others = numpy.flatnonzero(examples.labels != target)
    if not len(others):
        return None
    trigger = {name: options[name] for name in ("word", "patch") if name in options}
    marked = triggered(examples.take(others), **trigger)
    return replace(marked, labels=numpy.full(len(others), target, dtype=numpy.int64))


def rows_of(config: ClientConfig, task: Task, client: int, examples: Examples) -> Examples:
    """The rows that a client trains on: its own, or what an attacker makes of them."""
    clients = config.clients
    if client >= clients.attackers or clients.attack not in ON_ROWS:
        return examples
    rng = numpy_generator(config.seed, "client", client, "attack")
    data = Data(examples, len(task.label_names), rng)
    return ON_ROWS[clients.attack](data, **options_of(clients))


def sent(
    config: ClientConfig,
    client: int,
    server_round: int,
    start: Mapping[str, Tensor],
    trained: Tensors,
) -> Tensors:
    """What leaves a client: what it trained, or what an attacker makes of it."""
    clients = config.clients
    if client >= clients.attackers or clients.attack not in ON_UPDATES:
        return trained
    own = derive(config.seed, "client", client, "round", server_round, "attack")
    shared = derive(config.seed, "attackers", "round", server_round)
    update = Update(start, trained, own, shared)
    return ON_UPDATES[clients.attack](update, **options_of(clients))
