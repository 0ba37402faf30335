"""The closed form of LoRA-FAIR: a ridge regression on factors, and what makes it fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lowrank import LoraPair, weighted_sum


def ridge_correction(pairs: Sequence[LoraPair], weights: Sequence[float], ridge: float) -> Tensor:
    """``E A^T (A A^T + ridge I)^-1``, ``[d_out, r]`` in float64; ``E pinv(A)`` for ridge 0.

    E is ``sum_k p_k (B_k - B)(A_k - A)``. Through the SVD A = U diag(sigma) V^T it is
    E V diag(sigma / (sigma^2 + ridge)) U^T, right for any rank: directions below the rounding of
    the mean of the A_k are no part of A's row space. The reference for ``corrected_mean``.
    """
    A = weighted_sum([pair.A for pair in pairs], weights)  # [r, d_in]
    B = weighted_sum([pair.B for pair in pairs], weights)  # [d_out, r]
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    size = sum(p * float(pair.A.double().norm()) for p, pair in zip(weights, pairs, strict=True))
    kept = sigma > max(A.shape) * torch.finfo(A.dtype).eps * size
    U, sigma, V = U[:, kept], sigma[kept], Vh[kept].T  # V [d_in, rank]
    EV = torch.zeros(B.shape[0], V.shape[1], dtype=torch.float64)
    for p, pair in zip(weights, pairs, strict=True):  # E V, E centred: no cancellation
        EV += p * (pair.B.double() - B) @ ((pair.A.double() - A) @ V)
    change: Tensor = (EV * (sigma / (sigma**2 + ridge))) @ U.T
    return change


@dataclass(frozen=True)
class RowSpace:
    """What a correction towards the mean product needs of the mean A = U diag(sigma) V^T.

    Attributes:
        V: ``[d_in, rank]``, without the directions below the mean's rounding.
        AV: ``[r, rank]``.
        solve: ``diag(sigma / (sigma^2 + ridge)) U^T``, ``[rank, r]``.
    """

    V: Tensor
    AV: Tensor
    solve: Tensor

    @staticmethod
    def of(A: Tensor, size: float, ridge: float) -> RowSpace:
        """From the mean A in float64 and the mean Frobenius norm ``size`` of what it is made of.

        The SVD is that of the r x r triangle of A^T = Q R, so that nothing wide is iterated on.
        """
        Q, R = torch.linalg.qr(A.T)
        U, sigma, Wh = torch.linalg.svd(R.T, full_matrices=False)
        kept = sigma > max(A.shape) * torch.finfo(A.dtype).eps * size
        U, sigma, V = U[:, kept], sigma[kept], Q @ Wh[kept].T
        return RowSpace(V, A @ V, (sigma / (sigma**2 + ridge))[:, None] * U.T)


def sum_and_size(pairs: Sequence[LoraPair], weights: Sequence[float]) -> tuple[Tensor, float]:
    """``sum_k w_k A_k`` in float64, and ``sum_k w_k ||A_k||_F``, which its rounding goes by."""
    total = torch.zeros(pairs[0].A.shape, dtype=torch.float64)
    wide, size = torch.empty_like(total), 0.0
    for pair, weight in zip(pairs, weights, strict=True):
        total.add_(wide.copy_(pair.A), alpha=weight)
        flat = wide.flatten()
        size += weight * float(flat.dot(flat)) ** 0.5
    return total, size


@dataclass(frozen=True)
class Drift:
    """Sums over clients of ``X_k = (A_k - A) V`` and of B_k, in float64.

    Attributes:
        B: ``sum_k w_k B_k``, ``[d_out, r]``.
        BX: ``sum_k w_k B_k X_k``, ``[d_out, rank]``.
        X: ``sum_k w_k X_k``, ``[r, rank]``.
    """

    B: Tensor
    BX: Tensor
    X: Tensor

    @staticmethod
    def of(pairs: Sequence[LoraPair], weights: Sequence[float], V: Tensor, AV: Tensor) -> Drift:
        """One pass over both factors of each client, 4 r^2 (d_in + d_out) operations for each."""
        r, rank = AV.shape
        X = torch.empty(len(pairs), r, rank, dtype=torch.float64)
        wide = torch.empty(pairs[0].A.shape, dtype=torch.float64)
        for pair, own in zip(pairs, X, strict=True):
            torch.mm(wide.copy_(pair.A), V, out=own)
        X -= AV
        X *= torch.tensor(weights, dtype=torch.float64)[:, None, None]
        B = torch.zeros(pairs[0].B.shape, dtype=torch.float64)
        BX, wide = torch.zeros(B.shape[0], rank, dtype=torch.float64), torch.empty_like(B)
        for pair, weight, own in zip(pairs, weights, X, strict=True):
            B.add_(wide.copy_(pair.B), alpha=weight)
            BX.addmm_(wide, own)
        return Drift(B, BX, X.sum(0))

    def corrected(self, rows: RowSpace) -> Tensor:
        """The mean B plus its correction, of sums with weights that sum to 1.

        ``E V = sum_k p_k (B_k - B) X_k = BX - B X``, which is so for any X_k: those of clients that
        differ little are small before they meet B_k, so the difference keeps its digits.
        """
        change = torch.addmm(self.BX, self.B, self.X, alpha=-1) @ rows.solve
        return self.B + change


def corrected_mean(pairs: Sequence[LoraPair], weights: Sequence[float], ridge: float) -> LoraPair:
    """The mean A, and the mean B plus ``ridge_correction``, in the factors' own dtypes.

    Each client's A is read twice and its B once, each time into one array in float64.
    """
    A, size = sum_and_size(pairs, weights)
    rows = RowSpace.of(A, size, ridge)
    B = Drift.of(pairs, weights, rows.V, rows.AV).corrected(rows)
    first = pairs[0]
    return LoraPair(A.to(first.A.dtype), B.to(first.B.dtype), first.scale)
