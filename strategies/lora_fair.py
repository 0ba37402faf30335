"""LoRA-FAIR: the mean of B, corrected towards the mean of the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from fedlora.lowrank import Adapter, LoraPair, mean_vectors, transposed, weighted_mean
from fedlora.options import Count, NonNegative, Positive
from fedlora.ridge import corrected_mean
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.seeds import torch_generator
from fedlora.sums import RidgeSums, Sums
from strategies.base import LoraStrategy
from strategies.cosine import Target, descend
from strategies.rank_policy import RankPolicy
from strategies.traits import Traits


@dataclass(kw_only=True)
class LoraFair(LoraStrategy):
    """LoRA-FAIR: A averaged, B averaged and corrected so that B A nears the mean of the B_k A_k.

    Bian, Wang, Zhang and Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and
    Initialization Refinement", ICCV 2025, arXiv 2411.14961. With A = sum_k p_k A_k and
    B = sum_k p_k B_k, the server keeps A and sends B + dB:

        dB = argmin  S(sum_k p_k B_k A_k, (B + dB) A) + ridge ||dB||^2

    ``solver="closed_form"`` takes S = squared Frobenius distance, a ridge regression:
    dB = E A^T (A A^T + ridge I)^-1 with E = sum_k p_k (B_k - mean B)(A_k - mean A), on the
    unscaled factors, in float64, without a d_out x d_in matrix; ``ridge=0`` uses A's
    pseudo-inverse. ``solver="cosine_sgd"`` takes S = 1 - cosine similarity and plain SGD, which
    the paper describes (its Eq. 8 prints the similarity itself, which would be maximised away).

    Sources disagree on the rest. The text gives a penalty on the norm and 0.01; public code
    squares the norm, and most of it uses 1.0; some of it starts from a Xavier draw and averages
    cosines over columns (``paper_code``), others start from zero and flatten. A Xavier start
    with a small ridge leaves most of the draw in B, because descent cannot see the part of it
    outside A's row space; hence zero is the default.

    ``corrects="A"`` keeps the mean B and corrects A in the same way, through the transpose of
    every product: dA = (B^T B + ridge I)^-1 B^T E. It is no part of the method, but an ablation
    of it: which factor should carry the correction.

    Both ways travel r (d_in + d_out) numbers per layer and client, as for FedAvg.

    Attributes:
        corrects: the factor that is corrected, ``B`` or ``A``; the other one is the mean.
        solver: ``closed_form`` or ``cosine_sgd``.
        ridge: weight of ||dB||^2; larger stays closer to FedAvg.
        steps, lr, init, cosine: of ``cosine_sgd`` alone; ``cosine`` is over the whole matrix
            (``flat``) or the mean over its columns.
    """

    traits: ClassVar[Traits] = Traits(exact="nearer")
    mixed_ranks: ClassVar[RankPolicy] = RankPolicy(
        "pad", "it corrects towards the mean of the products, which padding keeps"
    )
    corrects: Literal["B", "A"] = "B"
    solver: Literal["closed_form", "cosine_sgd"] = "closed_form"
    ridge: NonNegative = 0.01
    steps: Count = 1000
    lr: Positive = 0.01
    init: Literal["zero", "xavier"] = "zero"
    cosine: Literal["flat", "columns"] = "flat"

    @classmethod
    def paper_code(cls, **options: Any) -> Self:  # Any: Flower's and our fields
        """The settings of the authors' line of public code: SGD, Xavier, ridge 1, columns."""
        preset = {"solver": "cosine_sgd", "ridge": 1.0, "init": "xavier", "cosine": "columns"}
        return cls(**{**preset, **options})

    def plan(self, server_round: int) -> LocalPlan:
        """Both factors train and travel."""
        return LocalPlan()

    def summed(self, server_round: int = 1) -> Sums | None:
        """Two passes for the closed form of B; descent needs every product."""
        closed = self.solver == "closed_form" and self.corrects == "B"
        return RidgeSums(self.ridge) if closed else None

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The means, with one factor corrected layer by layer."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        pairs = {}
        for name in adapters[0].pairs:
            uploads = [adapter.pairs[name] for adapter in adapters]
            if self.corrects == "A":
                uploads = [transposed(pair) for pair in uploads]
            if self.solver == "closed_form":
                merged = corrected_mean(uploads, weights, self.ridge)
            else:
                merged = self._descended(uploads, weights, state.round + 1, name)
            pairs[name] = transposed(merged) if self.corrects == "A" else merged
        return GlobalState(Adapter(pairs, mean_vectors(adapters, weights)), state.round + 1)

    def _descended(
        self, uploads: Sequence[LoraPair], weights: Sequence[float], server_round: int, name: str
    ) -> LoraPair:
        """One layer's means, with B corrected by gradient descent."""
        A = weighted_mean([pair.A for pair in uploads], weights)
        B = weighted_mean([pair.B for pair in uploads], weights)
        draw = torch_generator(self.seed, "lora_fair", server_round, name)
        target = Target.of(uploads, weights, LoraPair(A, B))
        change = descend(target, self.ridge, self.steps, self.lr, self.init, self.cosine, draw)
        return LoraPair(A, (B.double() + change).to(B.dtype), uploads[0].scale)
