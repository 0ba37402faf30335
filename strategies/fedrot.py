"""FedRot-LoRA: clients' factors turned towards the last adapter before they are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedlora.lowrank import Adapter, LoraPair, mean_vectors, nearest_rotation, weighted_sum
from fedlora.options import NonNegative, Share
from fedlora.ridge import corrected_mean
from fedlora.rounds import ClientUpdate, Factor, GlobalState, LocalPlan, shares
from strategies.base import LoraStrategy
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class FedRot(LoraStrategy):
    """FedRot-LoRA: each client's A and B rotated to meet the last adapter, then averaged.

    Zhang, Kim, Cha and Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated
    LoRA", ICML 2026, arXiv 2602.23638. With A' and B' the adapter that the round started from:

        even rounds   R_k = argmin |R^T A_k - A'|,   odd rounds   R_k = argmin |B_k R - B'|
        A = sum_k p_k R_k^T A_k,   B = sum_k p_k B_k R_k

    R_k is a rotation of the r directions, from an r x r SVD, so no client's product changes. As
    in the authors' code, an adapter with B' = 0 is no reference and R_k is then the identity,
    which for LoRA means that round 1 is FedAvg's.

    ``strength`` below 1 takes the rotation nearest to (1 - strength) I + strength R_k. The code's
    hard variant allows reflections (det R = -1), half way to which there is no rotation; here R_k
    is a rotation throughout. The paper rotates on clients; it is done here on the server, from
    the same factors, and what travels is FedAvg's: r (d_in + d_out) numbers per layer and client
    each way.

    Attributes:
        strength: how far to turn; 0 is FedAvg.
        then: ``mean`` averages; ``lora_fair`` also corrects B as LoRA-FAIR's closed form does.
        ridge: of ``lora_fair`` alone.
    """

    traits: ClassVar[Traits] = Traits()
    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "no", "a rotation mixes units that a client has with ones that it lacks"
    )
    strength: Share = 1.0
    then: Literal["mean", "lora_fair"] = "mean"
    ridge: NonNegative = 0.01

    def plan(self, server_round: int) -> LocalPlan:
        """Both factors train and travel."""
        return LocalPlan()

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The means of the turned factors, layer by layer; heads by examples."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        by: Factor = "B" if (state.round + 1) % 2 else "A"
        pairs = {}
        for name, pair in state.adapter.pairs.items():
            turned = [aligned(a.pairs[name], pair, by, self.strength) for a in adapters]
            if self.then == "mean":
                A = weighted_sum([one.A for one in turned], weights)
                B = weighted_sum([one.B for one in turned], weights)
            else:
                corrected = corrected_mean(turned, weights, self.ridge)
                A, B = corrected.A, corrected.B
            pairs[name] = LoraPair(A.to(pair.A.dtype), B.to(pair.B.dtype), pair.scale)
        return GlobalState(Adapter(pairs, mean_vectors(adapters, weights)), state.round + 1)


def aligned(pair: LoraPair, reference: LoraPair, by: Factor, strength: float = 1.0) -> LoraPair:
    """``(R^T A, B R)`` in float64: the same product, with one factor nearest to the reference's.

    Costs O(r^2 (d_in + d_out) + r^3).
    """
    A, B = pair.A.double(), pair.B.double()
    if by == "A":
        rotation = nearest_rotation(A, reference.A.double())
    else:
        rotation = nearest_rotation(B.T, reference.B.double().T)
    if strength < 1:
        still = torch.eye(len(rotation), dtype=torch.float64)
        rotation = nearest_rotation((1 - strength) * still + strength * rotation, still)
    return LoraPair(rotation.T @ A, B @ rotation, pair.scale)
