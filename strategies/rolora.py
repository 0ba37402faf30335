"""RoLoRA: one factor a round, by turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.lowrank import Adapter, LoraPair, mean_vectors, weighted_mean
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.sums import MeanSums, Sums
from strategies.base import LoraStrategy
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class RoLora(LoraStrategy):
    """RoLoRA: rounds train B and A by turns while the other stays; each is exact.

    Chen, Guo, Ju, Dalal, Zhu and Khisti, "Robust Federated Finetuning of LLMs via Alternating
    Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755.

        odd rounds    B = sum_k p_k B_k,   A stays,   so  sum_k p_k B_k A = B A
        even rounds   A = sum_k p_k A_k,   B stays,   so  sum_k p_k B A_k = B A

    B comes first: A's gradient is zero while B is. Up travel r d_out numbers per layer and client
    in odd rounds and r d_in in even ones. Down travel both factors, because clients keep nothing
    between rounds; in the paper they keep the factor that stays. A client whose other factor came
    back changed is refused.
    """

    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "pad", "the factor that rests is shared, so the mean stays exact"
    )
    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(exact="yes", noise="linear", up=("r * d_out", "r * d_in"))

    def plan(self, server_round: int) -> LocalPlan:
        """B trains in odd rounds, A in even ones."""
        return LocalPlan(train=("B",) if server_round % 2 else ("A",))

    def summed(self, server_round: int = 1) -> Sums:
        """The mean of the round's factor."""
        return MeanSums(*self.plan(server_round).train)

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of this round's factor and of the heads by examples; the other stays."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        (factor,) = self.plan(state.round + 1).train
        pairs = {}
        for name, pair in state.adapter.pairs.items():
            sent = [getattr(adapter.pairs[name], factor) for adapter in adapters]
            factors = {"A": pair.A, "B": pair.B, factor: weighted_mean(sent, weights)}
            pairs[name] = LoraPair(factors["A"], factors["B"], pair.scale)
        return GlobalState(Adapter(pairs, mean_vectors(adapters, weights)), state.round + 1)
