"""FedAvg on LoRA factors (FedIT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.lowrank import mean_adapter
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.sums import MeanSums, Sums
from strategies.base import LoraStrategy
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class FedAvg(LoraStrategy):
    """FedAvg: A and B averaged each by itself (FedIT).

    Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP
    2024, arXiv 2305.05644; McMahan et al., AISTATS 2017, arXiv 1602.05629.

        A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_j n_j

    The product of the means is not the mean of the products; ``aggregation_error`` says by how
    much. Each way travel r (d_in + d_out) numbers per layer and client, and the heads.
    """

    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "pad", "a unit that a client lacks is zero in the means"
    )
    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits()

    def plan(self, server_round: int) -> LocalPlan:
        """Both factors train and travel."""
        return LocalPlan()

    def summed(self, server_round: int = 1) -> Sums:
        """The means of both factors."""
        return MeanSums("AB")

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of each tensor by examples."""
        mean = mean_adapter([update.adapter for update in updates], shares(updates))
        return GlobalState(mean, state.round + 1)
