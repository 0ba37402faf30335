"""Local training of one client: the readable reference that every faster path must equal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.proximal import Pull
from clients.pruning import Penalty, Tail
from clients.turns import Turns
from fedlora.config import TrainConfig
from fedlora.errors import FedloraError
from fedlora.faults import reach
from fedlora.models.base import Inputs, TextInputs
from fedlora.models.checkpointing import checkpointed
from fedlora.stopwatch import turn
from fedlora.tasks.task import Examples, Objective


@dataclass(frozen=True)
class Rows:
    """One client's encoded examples.

    Attributes:
        inputs: cut into batches by row.
        labels: ``[N]`` int64; for language modelling, how many of a row's first tokens are given.
    """

    inputs: Inputs
    labels: Tensor

    @staticmethod
    def of(inputs: Inputs, examples: Examples) -> Rows:
        """Encoded examples with what they are held against."""
        if isinstance(inputs, TextInputs) and inputs.given:
            return Rows(inputs, torch.tensor(inputs.given))
        return Rows(inputs, torch.from_numpy(examples.labels))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """A hash of all examples; it tells a data set from another, so it stays on the client."""
        digest = hashlib.sha256()
        for key, tensor in {**self.inputs(range(len(self))), "labels": self.labels}.items():
            digest.update(f"{key}{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def example_losses(
    logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor, objective: Objective
) -> Tensor:
    """The loss of each example by itself, ``[b]``.

    Classification: cross-entropy of ``logits [b, classes]``. Language: the mean over a text's
    own next tokens of ``logits [b, T, vocab]``, so that no example weighs on another's loss; of
    the first ``labels [b]`` tokens, which are given, there is none.
    In float32 at least, whatever the model computes in.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if objective == "classify":
        return cross_entropy(logits, labels, reduction="none")
    targets, mask = _next_tokens(batch, labels)
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")  # [b, T-1]
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def _next_tokens(batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens to be told, and 1 for each that is learned, not given or padding; [b, T - 1]."""
    targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    place = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    return targets, mask * (place >= labels[:, None])


def batches(examples: int, config: TrainConfig, rng: numpy.random.Generator) -> Iterator[list[int]]:
    """Row numbers of each step's batch: without replacement within an epoch.

    The last batch of an epoch may be smaller.
    """
    left = config.step_count(examples)
    while left > 0:
        order = rng.permutation(examples)
        for start in range(0, examples, config.batch_size):
            if left == 0:
                return
            left -= 1
            yield order[start : start + config.batch_size].tolist()


def train(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    objective: Objective,
    config: TrainConfig,
    rng: numpy.random.Generator,
    tail: Tail | None = None,
) -> float:
    """Train ``parameters`` in place with a fresh optimiser; returns the mean loss of the steps.

    Dropout draws from torch's ambient stream, which the caller sets. ``tail``: see ``Penalty``.

    Raises:
        FedloraError: the loss stopped being a finite number.
        ConfigError: ``config.checkpointing`` for a model that cannot.
    """
    module.train()
    optimizer, pull = fresh_optimizer(parameters, config), Pull(parameters, config.proximal)
    turns, device, losses = Turns(module, parameters, config), parameters[0].device, []
    penalty = Penalty(module, parameters, tail)
    with checkpointed(module) if config.checkpointing else nullcontext():
        for step, picked in enumerate(batches(len(rows), config, rng)):
            batch = {key: value.to(device) for key, value in rows.inputs(picked).items()}
            turn("base forward")
            logits = module(**batch).logits
            loss = example_losses(logits, batch, rows.labels[picked].to(device), objective).mean()
            turn("base backward")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            turn("optimiser")
            turns.moving(step)
            turns.smooth()
            pull.add()
            penalty.add()
            if config.clip_gradient:
                nn.utils.clip_grad_norm_(parameters, config.clip_gradient)
            optimizer.step()
            reach("mid-step")
            turn("data")
            losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise FedloraError(
            f"training diverged: the loss is {mean} at learning rate {config.learning_rate:g}"
        )
    return mean


@dataclass(frozen=True)
class Measured:
    """What evaluation saw: sums over ``examples`` rows.

    ``predictions`` is how many labels or next tokens there were to say, and ``nats`` the sum of
    their losses, each counting the same however long its text.
    """

    examples: int
    loss: float
    correct: float
    predictions: float
    nats: float


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    rows: Rows,
    order: NDArray[numpy.int64],
    groups: NDArray[numpy.int64],
    objective: Objective,
    config: TrainConfig,
) -> dict[int, Measured]:
    """Summed loss and number right over the rows in ``order``, by the group of each.

    ``groups`` are the rows' in that order; their numbers are the keys. Batches are of rows of like
    length, whatever their groups, and sums are float64. For language, "right" is the share of a
    text's next tokens that were ranked first.
    """
    module.eval()
    device = next(module.parameters()).device
    picked = order.tolist()
    places = sorted(range(len(order)), key=lambda at: (rows.inputs.lengths[picked[at]], picked[at]))
    found = []
    for start in range(0, len(places), config.evaluate_batch_size):
        some = [picked[at] for at in places[start : start + config.evaluate_batch_size]]
        batch = {key: value.to(device) for key, value in rows.inputs(some).items()}
        labels = rows.labels[some].to(device)
        logits = module(**batch).logits
        loss = example_losses(logits, batch, labels, objective)
        right = _right(logits, batch, labels, objective)
        said = _predictions(batch, labels, objective).double()
        found.append(torch.stack([loss.double(), right.double(), said, said * loss]))  # [4, b]
    seen = numpy.zeros((4, len(order)))
    if found:
        seen[:, places] = torch.cat(found, dim=1).cpu().numpy()
    return {int(group): _sums(seen[:, groups == group]) for group in numpy.unique(groups)}


def _sums(seen: NDArray[numpy.float64]) -> Measured:
    """What losses, hits, predictions and nats ``[4, examples]`` come to."""
    return Measured(seen.shape[1], *seen.sum(axis=1).tolist())


def _predictions(batch: Mapping[str, Tensor], labels: Tensor, objective: Objective) -> Tensor:
    """``[b]`` how much of each example is predicted: its class, or its tokens but the first."""
    if objective == "classify":
        return torch.ones_like(labels)
    return batch["attention_mask"][:, 1:].sum(1)


def _right(
    logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor, objective: Objective
) -> Tensor:
    """``[b]`` 1 or 0 for a class, a share in [0, 1] for a text."""
    if objective == "classify":
        return logits.argmax(-1) == labels
    targets, mask = _next_tokens(batch, labels)
    hits = (logits[:, :-1].argmax(-1) == targets) * mask
    return hits.sum(1) / mask.sum(1).clamp(min=1)


def fresh_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """A fresh optimiser over what trains, and nothing else."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
