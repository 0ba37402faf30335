"""LA-LoRA: one factor in each local step, and a filter over its gradient."""

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
class LaLora(LoraStrategy):
    """LA-LoRA: local steps train B and A by turns; the server averages both.

    Liu, Miao, Xi and Liu, "Rethinking LoRA for Privacy-Preserving Federated Learning in Large
    Models", ICLR 2026, arXiv 2602.19926. In each round, from the global A and B:

        odd local steps    B <- B - eta F(g_B),   A rests
        even local steps   A <- A - eta F(g_A),   B rests
        server             A = sum_k p_k A_k,   B = sum_k p_k B_k

    g is the gradient, with DP-SGD the clipped and noised one of the factor that moves (and of the
    heads, which move in every step): no step puts noise on both factors, whose product would have
    it squared. F convolves with [1, 4, 6, 4, 1] / 16 along the layer's features, rows of A and
    columns of B; after the noise it is post-processing, and each step costs what any step costs.

    Rows are continued by their mirror image. The authors' code is another: A moves first, B has
    twice the learning rate, a batch's tensors are clipped at the median of their norms, and what is
    smoothed, by a Laplacian, is a step beside the optimiser's.

    Both ways travel r (d_in + d_out) numbers per layer and client, as for FedAvg, and averaging is
    as inexact. A client that does not read the message's ``by-step`` and ``smooth`` trains as for
    FedAvg.

    Attributes:
        smooth: whether gradients are filtered; without it LA-LoRA is the turns alone.
    """

    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "pad", "a unit that a client lacks is zero in the means"
    )
    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(noise="by turns")
    smooth: bool = True

    def plan(self, server_round: int) -> LocalPlan:
        """Both factors train and travel, by turns within the round."""
        return LocalPlan(by_step=True, smooth=self.smooth)

    def summed(self, server_round: int = 1) -> Sums:
        """The means of both factors."""
        return MeanSums("AB")

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of each tensor by examples."""
        mean = mean_adapter([update.adapter for update in updates], shares(updates))
        return GlobalState(mean, state.round + 1)
