"""A rule's sums as one vector of integers that can be masked, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.errors import WireError
from fedlora.fixed_point import FixedPoint, Words
from fedlora.lowrank import Adapter, LoraPair
from fedlora.rounds import ClientUpdate
from fedlora.sums import WEIGHT, Kind, Tensors
from fedlora.wire import Layout

HEAD = 2  # numbers before the sums of a first pass: examples, and examples times the loss


@dataclass(frozen=True)
class MaskedTotals:
    """What a sum of vectors of a first pass says.

    Attributes:
        examples: of all clients.
        loss: their mean training loss.
        sums: see ``Sums``.
    """

    examples: int
    loss: float
    sums: Tensors


def encoded(sums: Tensors, examples: int, fixed: FixedPoint, loss: float | None = None) -> Words:
    """One client's sums, of weight 1, times its examples; with a loss it is a first pass.

    A loss beyond the clip, or none at all, counts as the clip: it is for the record alone.

    Raises:
        WireError: more examples than are allowed, or a value beyond the clip.
    """
    if not 1 <= examples <= fixed.examples:
        raise WireError(f"{examples} examples, allowed: 1 to {fixed.examples} (secure.examples)")
    parts = []
    if loss is not None:
        bounded = min(max(loss, -fixed.clip), fixed.clip) if math.isfinite(loss) else fixed.clip
        parts.append(fixed.words(numpy.ones(1, dtype=numpy.int64), examples))
        parts.append(fixed.words(fixed.levels(numpy.array([bounded]), "train_loss"), examples))
    for name, tensor in _told(sums).items():
        levels = fixed.levels(tensor.double().numpy().reshape(-1), name.replace("{}", "*"))
        parts.append(fixed.words(levels, examples))
    return numpy.concatenate(parts)


def decoded(total: Words, like: Tensors, clients: int, fixed: FixedPoint) -> MaskedTotals:
    """A first pass's total over so many clients; ``like`` has the names and shapes of its sums.

    Raises:
        WireError: no clients could have added up to that.
    """
    whole = fixed.whole(total)
    examples = int(whole[0])
    if not clients <= examples <= clients * fixed.examples:
        raise WireError(f"the masks did not cancel: {clients} clients, {examples} examples")
    sums = tensors(whole[1:], {"loss": torch.zeros(()), **_told(like)}, examples, fixed)
    loss = float(sums.pop("loss")) / examples
    return MaskedTotals(examples, loss, {WEIGHT: torch.tensor(float(examples)).double(), **sums})


def tensors(
    whole: NDArray[numpy.int64], like: Mapping[str, Tensor], examples: int, fixed: FixedPoint
) -> dict[str, Tensor]:
    """Sums by name, in float64, of integers that so many examples have added up to.

    Raises:
        WireError: they cannot have.
    """
    if int(numpy.abs(whole).max(initial=0)) > examples * fixed.largest:
        raise WireError("the masks did not cancel: a sum is larger than its clients could make it")
    values, found, start = whole.astype(numpy.float64) * fixed.step, dict[str, Tensor](), 0
    for name, tensor in like.items():
        part = values[start : (start := start + tensor.numel())]
        found[name] = torch.from_numpy(part.copy()).reshape(tensor.shape)
    return found


def first_like(kind: Kind, layout: Layout) -> Tensors:
    """What a first pass adds up, of an adapter of this layout."""
    return kind.first([_any(layout)])


def second_like(kind: Kind, layout: Layout, told: Tensors) -> Tensors:
    """What a second pass adds up."""
    return kind.second([_any(layout)], told)


def numbers(sums: Tensors) -> int:
    """How many numbers are added up."""
    return sum(tensor.numel() for tensor in _told(sums).values())


def _told(sums: Tensors) -> dict[str, Tensor]:
    """All but the sum of weights, which goes before them as a whole number."""
    return {name: tensor for name, tensor in sums.items() if name != WEIGHT}


def _any(layout: Layout) -> ClientUpdate:
    """An update of a layout whose A has full rank, for its shapes."""
    shapes = {(field.pair, field.factor): field.shape for field in layout.fields}
    pairs = {
        name: LoraPair(torch.eye(*shapes[name, "A"]), torch.zeros(shapes[name, "B"]), scale)
        for name, scale in layout.scales.items()
    }
    vectors = {field.key: torch.zeros(field.shape) for field in layout.fields if not field.pair}
    return ClientUpdate(0, Adapter(pairs, vectors), 1.0)
