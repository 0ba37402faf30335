"""Low-rank maths on LoRA factors: but by ``middle_product``, no product is ever formed.

Letters follow the papers: ``A [r, d_in]``, ``B [d_out, r]``, ``delta = scale * B @ A``.
Sums and factorisations run in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted layer.

    Attributes:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scale: ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA).

    Raises:
        ValueError: the factors are not matrices of one common rank.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A is {list(self.A.shape)} and B is {list(self.B.shape)}; "
                "A must be [r, d_in] and B [d_out, r] with one r"
            )

    def delta(self) -> Tensor:
        """The change this pair makes to its layer's weight, ``[d_out, d_in]``."""
        return self.scale * (self.B @ self.A)


@dataclass(frozen=True)
class Adapter:
    """All that is trained: factor pairs by layer, and everything that averages linearly.

    Attributes:
        pairs: layer key (with ``{}`` where the factor's letter stands) to its factors.
        vectors: heads, biases, magnitudes and other trained tensors by their wire key.
    """

    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)


def transposed(pair: LoraPair) -> LoraPair:
    """The pair whose product is the transpose: ``A' = B^T``, ``B' = A^T``."""
    return LoraPair(pair.B.T, pair.A.T, pair.scale)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k weights[k] * tensors[k]`` in float64, added in the given order."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    wide = torch.empty_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(wide.copy_(tensor), alpha=weight)
    return total


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``weighted_sum`` in the tensors' own dtype; the weights must sum to 1."""
    return weighted_sum(tensors, weights).to(tensors[0].dtype)


def mean_adapter(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Each factor and each vector averaged by itself (FedIT); scales are the first adapter's."""
    first = adapters[0]
    return Adapter(
        pairs={
            name: LoraPair(
                weighted_mean([adapter.pairs[name].A for adapter in adapters], weights),
                weighted_mean([adapter.pairs[name].B for adapter in adapters], weights),
                pair.scale,
            )
            for name, pair in first.pairs.items()
        },
        vectors=mean_vectors(adapters, weights),
    )


def mean_vectors(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The vectors of all adapters averaged one by one."""
    return {
        name: weighted_mean([adapter.vectors[name] for adapter in adapters], weights)
        for name in adapters[0].vectors
    }


def product_norm(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> float:
    """``|| sum_i lefts[i] @ rights[i] ||_F`` for ``[d_out, r_i]`` and ``[r_i, d_in]``.

    Both stacks are reduced by QR, so the cost is ``O((d_out + d_in) R^2)`` with ``R = sum r_i``
    and the small differences of large products keep their digits; no ``d_out x d_in`` matrix.
    The reference for ``mean_and_error_norms``.
    """
    left = torch.cat([tensor.double() for tensor in lefts], dim=1)  # [d_out, R]
    right = torch.cat([tensor.double() for tensor in rights], dim=0)  # [R, d_in]
    R_left = torch.linalg.qr(left, mode="r").R
    R_right = torch.linalg.qr(right.T, mode="r").R
    return float(torch.linalg.matrix_norm(R_left @ R_right.T))


def mean_and_error_norms(
    uploads: Sequence[LoraPair], weights: Sequence[float], merged: LoraPair
) -> tuple[float, float]:
    """``|| W ||_F`` and ``|| W - s B A ||_F`` of one layer, ``W = sum_k p_k s_k B_k A_k``.

    One QR serves both: of ``[p_1 s_1 B_1 ... p_K s_K B_K, -s B]``, whose triangle then meets the
    stacked A_k and A. The norms keep the digits that ``product_norm`` keeps, and no matrix is
    larger than ``(R + r) x max(d_out, d_in)``, ``R = K r``. Uploads that hold one and the same
    tensor A are one product, ``(sum_k p_k s_k B_k) A``.
    """
    scaled = [p * upload.scale for p, upload in zip(weights, uploads, strict=True)]
    if all(upload.A is uploads[0].A for upload in uploads):
        lefts, rights = [weighted_sum([upload.B for upload in uploads], scaled)], [uploads[0].A]
    else:
        lefts = [s * upload.B.double() for s, upload in zip(scaled, uploads, strict=True)]
        rights = [upload.A for upload in uploads]
    left = torch.cat([*lefts, -merged.scale * merged.B.double()], dim=1)  # [d_out, R + r]
    right = torch.cat([*rights, merged.A]).double()  # [R + r, d_in]
    if left.shape[0] > left.shape[1]:
        left = torch.linalg.qr(left, mode="r").R
    r = merged.A.shape[0]
    product = left[:, :-r] @ right[:-r]
    norm = float(torch.linalg.matrix_norm(product))
    return norm, float(torch.linalg.matrix_norm(product.addmm_(left[:, -r:], right[-r:])))


def aggregation_error(
    adapters: Sequence[Adapter], weights: Sequence[float], merged: Adapter
) -> float:
    """How far a merged adapter is from the mean of the clients' weight changes, relative.

    ``|| sum_k p_k B_k A_k - B A ||_F / || sum_k p_k B_k A_k ||_F`` over all layers together,
    each product with its own scale; 0 is exact. Adapters without factor pairs average
    exactly by definition and give 0. When the clients changed nothing at all, the result is
    0 if the merged adapter changes nothing either, else infinity.
    """
    return relative_error(layer_norms(adapters, weights, merged).values())


def layer_norms(
    adapters: Sequence[Adapter], weights: Sequence[float], merged: Adapter
) -> dict[str, tuple[float, float]]:
    """``mean_and_error_norms`` of each layer, by the pair's key."""
    return {
        name: mean_and_error_norms([adapter.pairs[name] for adapter in adapters], weights, pair)
        for name, pair in merged.pairs.items()
    }


def relative_error(norms: Iterable[tuple[float, float]]) -> float:
    """``aggregation_error`` of the layers whose ``mean_and_error_norms`` these are.

    With e_l the error of layer l alone and w_l = ``|| W_l ||_F`` > 0, that of all together is
    ``sqrt(sum_l w_l^2 e_l^2 / sum_l w_l^2)``: never below the least e_l nor above the greatest.
    """
    error = ideal = 0.0
    for of_mean, of_error in norms:
        ideal += of_mean**2
        error += of_error**2
    if ideal == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return float((error / ideal) ** 0.5)


def best_rank(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], rank: int, balanced: bool = False
) -> LoraPair:
    """The best approximation of ``sum_i lefts[i] @ rights[i]`` of a rank, as factors of scale 1.

    With the singular values sigma and vectors U, V of the sum, B = U sigma and A = V^T, so that
    A A^T = I; ``balanced`` gives B = U sqrt(sigma) and A = sqrt(sigma) V^T. They come from the
    SVD of a core ``R_left R_right^T`` of the stacks' QR, which costs
    ``O((d_out + d_in) R^2 + R^3)`` with ``R = sum r_i``; no matrix is larger than the stacks.

    In each row of A the entry of largest magnitude is positive (the first of equals). A direction
    that the sum lacks has an orthonormal row in A and a zero column in B either way: it can still
    be trained, which zeros in both could not.

    Args:
        lefts: each ``[d_out, r_i]``.
        rights: each ``[r_i, d_in]``.
        rank: r, of the result; rows of A beyond ``min(R, d_in)`` are zero.
        balanced: how sigma is shared out.
    """
    left, by_left = _unit(torch.cat([tensor.double() for tensor in lefts], dim=1))  # [d_out, R]
    right, by_right = _unit(torch.cat([tensor.double() for tensor in rights], dim=0))  # [R, d_in]
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T)  # all of V: rows for what sigma lacks
    rows, columns = min(rank, len(Vh)), min(rank, len(sigma))
    A = torch.zeros(rank, right.shape[1], dtype=torch.float64)
    B = torch.zeros(left.shape[0], rank, dtype=torch.float64)
    A[:rows] = Vh[:rows] @ Q_right.T
    largest = A.gather(1, A.abs().argmax(dim=1, keepdim=True))  # [r, 1]
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    A *= sign
    strength = sigma[:columns] * by_left * by_right
    B[:, :columns] = (Q_left @ U[:, :columns]) * strength * sign[:columns, 0]
    if balanced:
        lost = len(sigma) * torch.finfo(torch.float64).eps * sigma[0]
        root = torch.where(sigma[:columns] > lost, strength, 1.0).sqrt()
        A[:columns] *= root[:, None]
        B[:, :columns] /= root
    return LoraPair(A, B)


def product_distances(uploads: Sequence[LoraPair]) -> Tensor:
    """``|| s_i B_i A_i - s_j B_j A_j ||_F^2`` of one layer for all pairs, ``[K, K]`` in float64.

    From the Gram matrices of the stacked factors, since ``<B_i A_i, B_j A_j>`` is the sum of the
    entries of ``(B_i^T B_j) * (A_i A_j^T)``: O((d_out + d_in) R^2) with ``R = K r``, and no matrix
    is larger than the stacks or ``R x R``. Products nearer to each other than 1e-7 of their norm
    cannot be told apart.
    """
    left = torch.cat([upload.scale * upload.B.double() for upload in uploads], dim=1)  # [d_out, R]
    right = torch.cat([upload.A.double() for upload in uploads])  # [R, d_in]
    K, r = len(uploads), len(uploads[0].A)
    inner = (left.T @ left).mul_(right @ right.T).reshape(K, r, K, r).sum((1, 3))
    squares = inner.diagonal()
    return (squares[:, None] + squares - 2 * inner).clamp(min=0.0)


def middle_mean(stack: Tensor, cut: int) -> Tensor:
    """Of ``[K, *shape]`` each coordinate's mean without its ``cut`` least and ``cut`` largest.

    With ``cut = (K - 1) // 2`` it is the median; for even K, the mean of the middle two.
    """
    return stack.sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def middle_product(uploads: Sequence[LoraPair], cut: int, block: int = 2**22) -> Tensor:
    """``middle_mean`` of the products ``s_k B_k A_k`` of one layer, ``[d_out, d_in]`` in float64.

    No factors say what the middle of products is, so here the products are formed, a few rows of
    all K at a time: ``block`` numbers of them (one row at least) and as many sorted are in memory
    beside the result. Costs O(K d_out d_in (r + log K)).
    """
    B = torch.stack([upload.scale * upload.B.double() for upload in uploads])  # [K, d_out, r]
    A = torch.stack([upload.A.double() for upload in uploads])  # [K, r, d_in]
    rows = max(1, block // (len(A) * A.shape[2]))
    return torch.cat([middle_mean(part @ A, cut) for part in B.split(rows, dim=1)])


def nearest_rotation(moving: Tensor, fixed: Tensor) -> Tensor:
    """The rotation R with ``R^T moving`` nearest to ``fixed``, ``[r, r]`` in float64; det R = 1.

    U V^T of the SVD of ``moving fixed^T``, with the last column of U turned round where that
    would be a reflection (Kabsch, Acta Crystallographica A32, 1976). The identity if either is
    zero, or they have nothing in common. Both are ``[r, d]``; lengths do not matter.
    """
    shared = _unit(moving.double())[0] @ _unit(fixed.double())[0].T
    if not bool(shared.any()):
        return torch.eye(len(shared), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(shared)
    if torch.linalg.det(U) * torch.linalg.det(Vh) < 0:
        U[:, -1] *= -1
    rotation: Tensor = U @ Vh
    return rotation


def _unit(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix over its largest magnitude, and that: products of huge numbers stay finite."""
    largest = float(matrix.abs().max())
    return (matrix / largest, largest) if largest else (matrix, 1.0)
