"""FFA-LoRA: freeze A, federate B."""

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
class FfaLora(LoraStrategy):
    """FFA-LoRA: A is one shared random draw that never changes, B is averaged; exact.

    Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
    arXiv 2403.12313.

        B = sum_k p_k B_k,   A = A_0,   so  sum_k p_k B_k A_0 = B A_0

    Up travel r d_out numbers per layer and client. Down travels the same when clients draw A_0
    from the run's seed, as Fedlora's do; stock PEFT clients cannot, so by default A_0 goes down
    with B in every round. A client whose A_0 came back changed is refused.

    Attributes:
        send_frozen: whether A_0 travels to clients. Without it they must hold the same draw, which
            they check by its fingerprint.
    """

    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "pad", "a client's A is the first rows of the shared draw; stays exact"
    )
    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(
        exact="yes", noise="linear", up=("r * d_out",), down=("r * d_out",)
    )
    send_frozen: bool = True

    def plan(self, server_round: int) -> LocalPlan:
        """Only B trains."""
        return LocalPlan(train=("B",), send=("A", "B") if self.send_frozen else ("B",))

    def summed(self, server_round: int = 1) -> Sums:
        """The mean of B."""
        return MeanSums("B")

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of B and of the heads by examples; A stays."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        pairs = {
            name: LoraPair(
                state.adapter.pairs[name].A,
                weighted_mean([adapter.pairs[name].B for adapter in adapters], weights),
                pair.scale,
            )
            for name, pair in adapters[0].pairs.items()
        }
        return GlobalState(Adapter(pairs, mean_vectors(adapters, weights)), state.round + 1)
