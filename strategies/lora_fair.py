"""LoRA-FAIR: the mean of B, corrected towards the mean of the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fedlora.lowrank import Adapter, LoraPair, mean_adapter, weighted_mean
from fedlora.options import Count, NonNegative, Positive
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.seeds import torch_generator
from strategies.base import LoraStrategy
from strategies.cosine import Target, descend


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

    Both ways travel r (d_in + d_out) numbers per layer and client, as for FedAvg.

    Attributes:
        solver: ``closed_form`` or ``cosine_sgd``.
        ridge: weight of ||dB||^2; larger stays closer to FedAvg.
        steps, lr, init, cosine: of ``cosine_sgd`` alone; ``cosine`` is over the whole matrix
            (``flat``) or the mean over its columns.
    """

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

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The means, with B corrected layer by layer."""
        adapters, weights = [update.adapter for update in updates], shares(updates)
        mean = mean_adapter(adapters, weights)
        pairs = {}
        for name, pair in mean.pairs.items():
            uploads = [adapter.pairs[name] for adapter in adapters]
            if self.solver == "closed_form":
                change = ridge_correction(uploads, weights, self.ridge)
            else:
                draw = torch_generator(self.seed, "lora_fair", state.round + 1, name)
                target = Target.of(uploads, weights, pair)
                change = descend(
                    target, self.ridge, self.steps, self.lr, self.init, self.cosine, draw
                )
            B = (pair.B.double() + change).to(pair.B.dtype)
            pairs[name] = LoraPair(pair.A, B, pair.scale)
        return GlobalState(Adapter(pairs, mean.vectors), state.round + 1)


def ridge_correction(pairs: Sequence[LoraPair], weights: Sequence[float], ridge: float) -> Tensor:
    """``E A^T (A A^T + ridge I)^-1``, ``[d_out, r]`` in float64; ``E pinv(A)`` for ridge 0.

    Through the SVD A = U diag(sigma) V^T as E V diag(sigma / (sigma^2 + ridge)) U^T, right for
    any rank: directions below the rounding of the mean of the A_k are no part of A's row space.
    Costs O(K r^2 (d_out + d_in) + r^3).
    """
    A = weighted_mean([pair.A.double() for pair in pairs], weights)  # [r, d_in]
    B = weighted_mean([pair.B.double() for pair in pairs], weights)  # [d_out, r]
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    largest = max(float(pair.A.double().norm()) for pair in pairs)
    kept = sigma > max(A.shape) * torch.finfo(A.dtype).eps * largest
    U, sigma, V = U[:, kept], sigma[kept], Vh[kept].T  # V [d_in, rank]
    EV = torch.zeros(B.shape[0], V.shape[1], dtype=torch.float64)
    for p, pair in zip(weights, pairs, strict=True):  # E V, E centred: no cancellation
        EV += p * (pair.B.double() - B) @ ((pair.A.double() - A) @ V)
    change: Tensor = (EV * (sigma / (sigma**2 + ridge))) @ U.T
    return change
