"""The cosine objective of LoRA-FAIR, and gradient descent on it without the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.lowrank import LoraPair

EPS = 1e-8  # each norm is at least this, as in torch's cosine_similarity


@dataclass(frozen=True)
class Target:
    """The mean of products ``W = sum_k p_k B_k A_k`` through an orthonormal basis of its columns.

    Attributes:
        basis: ``Q [d_out, m]`` with m = min(d_out, K r): ``W = Q core``.
        core: ``[m, d_in]``.
        A, B: the means ``[r, d_in]`` and ``[d_out, r]``.
    """

    basis: Tensor
    core: Tensor
    A: Tensor
    B: Tensor

    @staticmethod
    def of(pairs: Sequence[LoraPair], weights: Sequence[float], mean: LoraPair) -> Target:
        """The target of unscaled factors, in float64."""
        left = torch.cat([pair.B.double() for pair in pairs], dim=1)  # [d_out, K r]
        right = torch.cat(
            [p * pair.A.double() for p, pair in zip(weights, pairs, strict=True)]
        )  # [K r, d_in]
        Q, R = torch.linalg.qr(left)
        return Target(Q, R @ right, mean.A.double(), mean.B.double())


def similarity(target: Target, change: Tensor, cosine: Literal["flat", "columns"]) -> Tensor:
    """The cosine of ``W`` and ``(B + change) A``: of the flattened matrices, or column by column
    and then averaged.
    """  # noqa: D205
    B = target.B + change
    inner = (target.core * ((target.basis.T @ B) @ target.A)).sum(0)  # [d_in]
    norm_W = target.core.square().sum(0)  # [d_in]
    norm_BA = (target.A * ((B.T @ B) @ target.A)).sum(0)  # [d_in]
    if cosine == "flat":
        inner, norm_W, norm_BA = inner.sum(), norm_W.sum(), norm_BA.sum()
    lengths = norm_W.clamp(min=EPS**2).sqrt() * norm_BA.clamp(min=EPS**2).sqrt()
    return (inner / lengths).mean()


def descend(
    target: Target,
    ridge: float,
    steps: int,
    lr: float,
    init: Literal["zero", "xavier"],
    cosine: Literal["flat", "columns"],
    generator: torch.Generator,
) -> Tensor:
    """``steps`` of plain gradient descent on ``1 - similarity + ridge ||dB||_F^2``.

    A sum over layers has this gradient layer by layer, so one layer at a time is the same.

    Returns:
        dB ``[d_out, r]`` in float64; zero where there is nothing to correct towards.
    """
    change = torch.zeros_like(target.B)
    if init == "xavier":
        torch.nn.init.xavier_uniform_(change, generator=generator)
    elif not target.core.any() or float(target.B.norm() * target.A.norm()) < EPS:
        return change  # no mean product, or one without a direction to turn
    change.requires_grad_(True)
    for _ in range(steps):
        loss = 1 - similarity(target, change, cosine) + ridge * change.square().sum()
        (gradient,) = torch.autograd.grad(loss, change)
        with torch.no_grad():
            change -= lr * gradient
    return change.detach()
