"""FedSA-LoRA: share A, keep B; or share nothing, as a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedlora.lowrank import Adapter, LoraPair, weighted_mean
from fedlora.rounds import PIECES, ClientUpdate, GlobalState, LocalPlan, shares
from strategies.base import LoraStrategy
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class FedSaLora(LoraStrategy):
    """FedSA-LoRA: clients train both factors and share A alone; B and heads stay their own.

    Guo, Zeng, Wang, Fan, Wang and Qu, "Selective Aggregation for Low-Rank Adaptation in Federated
    Learning", ICLR 2025, arXiv 2410.01463. Client k goes on from its own B_k and the common A:

        A = sum_k p_k A_k,   W_k = W_0 + s B_k A

    Heads stay too, as in the authors' settings for classification. Each way travel r d_in numbers
    per layer and client. There is no product that all share, so no aggregation error is recorded.
    The server's own adapter, which it saves, is the mean A with the first draw's B, zero, and its
    heads: what a client starts from. Losses and accuracies are of each asked client's own
    adapter on its share of the held-out examples.

    Clients must keep state between rounds, as ours do. A reply with B or a head in it is refused.

    Attributes:
        share: ``none`` is local training alone, what a federation must beat: each client goes on
            from all that it trained, nothing travels, and the server's adapter is the first draw.
    """

    share: Literal["A", "none"] = "A"

    traits: ClassVar[Traits] = Traits(exact="personal", up=("r * d_in",), down=("r * d_in",))
    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "no", "what a client keeps has the rank of the adapter"
    )
    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def plan(self, server_round: int) -> LocalPlan:
        """Both factors train; A travels, if anything does."""
        if self.share == "none":
            return LocalPlan(send=(), personal=PIECES)
        return LocalPlan(send=("A",), personal=("B", "heads"))

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of A by examples, if it is shared; all else is as at first."""
        if self.share == "none":
            return GlobalState(state.adapter, state.round + 1)
        weights = shares(updates)
        pairs = {
            name: LoraPair(
                weighted_mean([update.adapter.pairs[name].A for update in updates], weights),
                pair.B,
                pair.scale,
            )
            for name, pair in state.adapter.pairs.items()
        }
        return GlobalState(Adapter(pairs, state.adapter.vectors), state.round + 1)
