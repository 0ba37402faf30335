"""Merges from sums over clients, which can be added up where the clients were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fedlora.lowrank import Adapter, LoraPair, best_rank, weighted_sum
from fedlora.ridge import Drift, RowSpace, sum_and_size
from fedlora.rounds import ClientUpdate, GlobalState

Tensors = Mapping[str, Tensor]  # in float64
WEIGHT = "weight"  # sum_k n_k; every other sum is weighted by n_k


class Sums(Protocol):
    """A rule's merge from sums over updates: of one pass, or of two."""

    two_passes: ClassVar[bool]

    def first(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """What some clients add."""
        ...

    def question(self, totals: Tensors) -> Tensors:
        """What a second pass must know of the first one's totals; nothing where one is enough."""
        ...

    def second(self, updates: Sequence[ClientUpdate], told: Tensors) -> Tensors:
        """What they add to the second."""
        ...

    def merged(self, state: GlobalState, totals: Tensors) -> GlobalState:
        """The next state from the totals of all passes."""
        ...


@dataclass(frozen=True)
class MeanSums:
    """Means of factors and vectors; a factor that is not named stays as it is."""

    two_passes: ClassVar[bool] = False
    factors: str = "AB"

    def first(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """``sum_k n_k`` times each factor and each vector."""
        weights = [update.examples for update in updates]
        sums = _vector_sums(updates)
        for name in updates[0].adapter.pairs:
            for factor in self.factors:
                own = [getattr(update.adapter.pairs[name], factor) for update in updates]
                sums[name.format(factor)] = weighted_sum(own, weights)
        return sums

    def question(self, totals: Tensors) -> Tensors:
        """Nothing: one pass is enough."""
        return {}

    def second(self, updates: Sequence[ClientUpdate], told: Tensors) -> Tensors:
        """Nothing."""
        return {}

    def merged(self, state: GlobalState, totals: Tensors) -> GlobalState:
        """The means."""
        pairs = {
            name: LoraPair(
                self._factor(totals, name, "A", pair.A),
                self._factor(totals, name, "B", pair.B),
                pair.scale,
            )
            for name, pair in state.adapter.pairs.items()
        }
        return _next(state, pairs, totals)

    def _factor(self, totals: Tensors, name: str, factor: str, old: Tensor) -> Tensor:
        """One factor's mean, or the factor as it was."""
        return _mean(totals, name.format(factor), old) if factor in self.factors else old


@dataclass(frozen=True)
class RidgeSums:
    """LoRA-FAIR's closed form: first the mean A, then B and the drift in A's row space."""

    two_passes: ClassVar[bool] = True
    ridge: float = 0.01

    def first(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """``sum_k n_k`` times each A, its norm and each vector."""
        weights = [update.examples for update in updates]
        sums = _vector_sums(updates)
        for name in updates[0].adapter.pairs:
            total, size = sum_and_size([update.adapter.pairs[name] for update in updates], weights)
            sums[f"A {name}"], sums[f"size {name}"] = total, _number(size)
        return sums

    def question(self, totals: Tensors) -> Tensors:
        """Each mean A's row space."""
        told: dict[str, Tensor] = {}
        for key in totals:
            if key.startswith("A "):
                rows = self._rows(totals, name := key.removeprefix("A "))
                told |= {f"V {name}": rows.V, f"AV {name}": rows.AV}
        return told

    def second(self, updates: Sequence[ClientUpdate], told: Tensors) -> Tensors:
        """The sums of ``Drift``."""
        weights = [update.examples for update in updates]
        sums: dict[str, Tensor] = {}
        for name in updates[0].adapter.pairs:
            pairs = [update.adapter.pairs[name] for update in updates]
            drift = Drift.of(pairs, weights, told[f"V {name}"], told[f"AV {name}"])
            sums |= {f"B {name}": drift.B, f"BX {name}": drift.BX, f"X {name}": drift.X}
        return sums

    def merged(self, state: GlobalState, totals: Tensors) -> GlobalState:
        """The mean A, and the corrected mean B."""
        weight, pairs = float(totals[WEIGHT]), {}
        for name, old in state.adapter.pairs.items():
            drift = Drift(*(totals[f"{part} {name}"] / weight for part in ("B", "BX", "X")))
            B = drift.corrected(self._rows(totals, name)).to(old.B.dtype)
            pairs[name] = LoraPair(_mean(totals, f"A {name}", old.A), B, old.scale)
        return _next(state, pairs, totals)

    def _rows(self, totals: Tensors, name: str) -> RowSpace:
        """The row space of one layer's mean A."""
        weight = totals[WEIGHT]
        size = float(totals[f"size {name}"] / weight)
        return RowSpace.of(totals[f"A {name}"] / weight, size, self.ridge)


@dataclass(frozen=True)
class SvdSums:
    """FedSVD: the mean of B, then B A written anew with orthonormal A in every n-th round."""

    two_passes: ClassVar[bool] = False
    every: int = 1

    def first(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """``sum_k n_k`` times each B and each vector."""
        return MeanSums("B").first(updates)

    def question(self, totals: Tensors) -> Tensors:
        """Nothing: one pass is enough."""
        return {}

    def second(self, updates: Sequence[ClientUpdate], told: Tensors) -> Tensors:
        """Nothing."""
        return {}

    def merged(self, state: GlobalState, totals: Tensors) -> GlobalState:
        """The factors of the mean product."""
        pairs = {}
        for name, old in state.adapter.pairs.items():
            A, B = old.A.double(), totals[name.format("B")] / totals[WEIGHT]
            if (state.round + 1) % self.every == 0:
                anew = best_rank([B], [A], rank=len(A))
                A, B = anew.A, anew.B
            pairs[name] = LoraPair(A.to(old.A.dtype), B.to(old.B.dtype), old.scale)
        return _next(state, pairs, totals)


Kind = MeanSums | RidgeSums | SvdSums
KINDS: dict[str, type[Kind]] = {"mean": MeanSums, "ridge": RidgeSums, "svd": SvdSums}


def known(sums: Sums | None) -> Kind:
    """Sums that can travel as text; whoever asks for a rule's has refused it without any."""
    assert isinstance(sums, MeanSums | RidgeSums | SvdSums)
    return sums


def _vector_sums(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """The sum of weights, and the weighted sum of each vector."""
    weights = [update.examples for update in updates]
    vectors = {
        key: weighted_sum([update.adapter.vectors[key] for update in updates], weights)
        for key in updates[0].adapter.vectors
    }
    return {WEIGHT: _number(sum(weights)), **vectors}


def _number(value: float) -> Tensor:
    """A number as a tensor of no dimension."""
    return torch.tensor(value, dtype=torch.float64)


def _mean(totals: Tensors, key: str, like: Tensor) -> Tensor:
    """A sum over the sum of weights, in the dtype of ``like``."""
    return (totals[key] / totals[WEIGHT]).to(like.dtype)


def _next(state: GlobalState, pairs: Mapping[str, LoraPair], totals: Tensors) -> GlobalState:
    """The state with these pairs and the means of the vectors."""
    vectors = {key: _mean(totals, key, old) for key, old in state.adapter.vectors.items()}
    return GlobalState(Adapter(pairs, vectors), state.round + 1)
