"""FedSVD: federate B, and let an SVD move what it learned into A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.lowrank import Adapter, LoraPair, best_rank, mean_vectors, weighted_sum
from fedlora.options import Count
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.sums import Sums, SvdSums
from strategies.base import LoraStrategy
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class FedSvd(LoraStrategy):
    """FedSVD: B is trained and averaged; the server writes B A anew with orthonormal A; exact.

    Lee, Park, Lee, Wagner, Seong, Bocklet, Lee and Hwang, "FedSVD: Adaptive Orthogonalization for
    Private Federated Learning with LoRA", NeurIPS 2025, arXiv 2505.12805. With A of the round:

        sum_k p_k B_k A = U diag(sigma) V^T,   B <- U diag(sigma),   A <- V^T

    The product stays as it is, because its rank is at most r. A A^T = I bounds the gradient of B
    by that of the layer's output, of which in the paper DP-SGD clips less; and what the server
    does to the mean of B is post-processing. The first A is the adapter's draw, as it was drawn.
    Where B A is zero or lacks a direction, A is completed within its old row space by the QR of
    ``lowrank.best_rank``, which the authors' code leaves to the SVD of the dense product.

    Up travel r d_out numbers per layer and client, down r (d_in + d_out). A client whose A came
    back changed is refused.

    Attributes:
        every: rounds from one SVD to the next; between them A stays.
    """

    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "svd", "A is shared and its rows stand by singular value; stays exact"
    )
    linear: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(exact="yes", noise="linear", up=("r * d_out",))
    every: Count = 1

    def plan(self, server_round: int) -> LocalPlan:
        """Only B trains; both travel to clients."""
        return LocalPlan(train=("B",))

    def summed(self, server_round: int = 1) -> Sums:
        """The mean of B, then the SVD."""
        return SvdSums(self.every)

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of B by examples, then B A refactored; heads by examples."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        pairs = {}
        for name, pair in state.adapter.pairs.items():
            A = pair.A.double()
            B = weighted_sum([adapter.pairs[name].B for adapter in adapters], weights)
            if (state.round + 1) % self.every == 0:
                anew = best_rank([B], [A], rank=len(A))
                A, B = anew.A, anew.B
            pairs[name] = LoraPair(A.to(pair.A.dtype), B.to(pair.B.dtype), pair.scale)
        return GlobalState(Adapter(pairs, mean_vectors(adapters, weights)), state.round + 1)
