"""LoRA-FAIR against dense float64: normal equations, pseudo-inverses, torch's cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter, LoraPair, weighted_mean
from fedlora.rounds import GlobalState
from strategies import FedAvg, LoraFair
from tests.helpers import (
    Shapes,
    build,
    difference,
    layer,
    merged,
    normal,
    pair,
    random,
    random_adapter,
    updates_of,
    with_pairs,
)

torch.set_num_threads(1)

TIGHT = 1e-10
COUNTS = {1: [7.0], 2: [3.0, 5.0], 5: [1.0, 10.0, 4.0, 2.5, 7.0]}
SHAPES = [(7, 11), (13, 6), (5, 17)]
RIDGES = [0.0, 1e-6, 1e-3, 0.01, 0.1, 1.0, 10.0, 1e3]
EYE = torch.eye(3, dtype=torch.float64)


def drifted(count: int, shape: tuple[int, int] = (7, 11), seed: int = 0) -> list[LoraPair]:
    """Clients around a common adapter."""
    common = pair(900 + seed, *shape)
    return [
        LoraPair(common.A + 0.7 * own.A, common.B + 0.7 * own.B)
        for own in (pair(31 * seed + k, *shape) for k in range(count))
    ]


def means(pairs: Sequence[LoraPair], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean A, mean B, and the mean product, which only the tests form."""
    W = torch.stack([p * ab.B @ ab.A for p, ab in zip(weights, pairs, strict=True)]).sum(0)
    A = weighted_mean([ab.A for ab in pairs], weights)
    return A, weighted_mean([ab.B for ab in pairs], weights), W


def dense_correction(pairs: Sequence[LoraPair], weights: Sequence[float], ridge: float) -> Tensor:
    """The least-squares problem with every row written out, solved by numpy-style lstsq.

    min ||E - dB A||^2 + ridge ||dB||^2 is ordinary least squares on [A^T; sqrt(ridge) I].
    """
    A, B, W = means(pairs, weights)
    rows = torch.cat([A.T, ridge**0.5 * torch.eye(A.shape[0], dtype=A.dtype)])
    targets = torch.cat([(W - B @ A).T, torch.zeros(A.shape[0], B.shape[0], dtype=A.dtype)])
    return torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T


def correction(pairs: Sequence[LoraPair], counts: Sequence[float], **options: Any) -> Tensor:
    """dB as the rule itself applies it: new B less the mean B."""
    adapters = [Adapter({layer("query"): ab}) for ab in pairs]
    found = merged(build(LoraFair, scales=None, **options), adapters, counts)
    return found.pairs[layer("query")].B - means(pairs, normal(counts))[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ridge", RIDGES)
def test_closed_form_is_the_dense_least_squares(
    shape: tuple[int, int], count: int, ridge: float
) -> None:
    pairs, counts = drifted(count, shape), COUNTS[count]
    expected = dense_correction(pairs, normal(counts), ridge)
    torch.testing.assert_close(
        correction(pairs, counts, ridge=ridge), expected, rtol=TIGHT, atol=1e-12
    )
    A, B, W = means(pairs, normal(counts))
    normal_equations = (W - B @ A) @ A.T @ torch.linalg.inv(A @ A.T + ridge * EYE)
    torch.testing.assert_close(expected, normal_equations, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", RIDGES)
def test_a_corrected_is_the_dense_least_squares_of_the_transpose(
    shape: tuple[int, int], ridge: float
) -> None:
    """min ||E - B dA||^2 + ridge ||dA||^2, rows written out; B stays the mean."""
    pairs, counts = drifted(5, shape), COUNTS[5]
    A, B, W = means(pairs, normal(counts))
    rows = torch.cat([B, ridge**0.5 * EYE])
    targets = torch.cat([W - B @ A, torch.zeros(3, A.shape[1], dtype=A.dtype)])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution
    adapters = [Adapter({layer("query"): ab}) for ab in pairs]
    rule = build(LoraFair, scales=None, ridge=ridge, corrects="A")
    found = merged(rule, adapters, counts).pairs[layer("query")]
    torch.testing.assert_close(found.A - A, expected, rtol=TIGHT, atol=1e-12)
    torch.testing.assert_close(found.B, B, rtol=1e-15, atol=1e-15)
    assert float((found.A - A).norm()) > 1e-6


def stationary(dB: Tensor, pairs: Sequence[LoraPair], p: Sequence[float], ridge: float) -> float:
    """How far (W - B' A) A^T is from ridge dB, relative to E A^T."""
    A, B, W = means(pairs, p)
    gradient = (W - (B + dB) @ A) @ A.T - ridge * dB
    return float(gradient.norm() / ((W - B @ A) @ A.T).norm())


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("ridge", RIDGES)
def test_stationarity(count: int, ridge: float) -> None:
    pairs, counts = drifted(count), COUNTS[count]
    dB = correction(pairs, counts, ridge=ridge)
    assert stationary(dB, pairs, normal(counts), ridge) < TIGHT


def test_wrong_formulas_are_not_stationary() -> None:
    """The check above tells the right formula from near misses."""
    pairs, p, ridge = drifted(5), normal(COUNTS[5]), 0.01
    A, B, W = means(pairs, p)
    E, inverse = W - B @ A, torch.linalg.inv(A @ A.T + ridge * EYE)
    plain = weighted_mean([ab.A for ab in pairs], [0.2] * 5)
    wrong = {
        "without the inverse": E @ A.T,
        "of the wrong sign": -E @ A.T @ inverse,
        "not centred": W @ A.T @ inverse,
        "ridge forgotten": E @ A.T @ torch.linalg.inv(A @ A.T),
        "ridge outside": E @ A.T @ torch.linalg.inv(A @ A.T) / (1 + ridge),
        "unweighted mean A": E @ plain.T @ torch.linalg.inv(plain @ plain.T + ridge * EYE),
    }
    assert stationary(E @ A.T @ inverse, pairs, p, ridge) < TIGHT
    for name, dB in wrong.items():
        assert stationary(dB, pairs, p, ridge) > 1e-5, name


def test_infinite_ridge_is_fedavg() -> None:
    adapters, counts = [random_adapter(k) for k in range(5)], COUNTS[5]
    fair = merged(build(LoraFair, ridge=1e12), adapters, counts)
    assert difference(fair, merged(build(FedAvg), adapters, counts)) < 1e-11
    assert float(correction(drifted(5), counts, ridge=1e12).norm()) < 1e-11


@pytest.mark.parametrize("count", [2, 5])
def test_no_ridge_is_the_pseudo_inverse(count: int) -> None:
    pairs, counts = drifted(count), COUNTS[count]
    A, B, W = means(pairs, normal(counts))
    dB = correction(pairs, counts, ridge=0.0)
    expected = (W - B @ A) @ torch.linalg.pinv(A)
    torch.testing.assert_close(dB, expected, rtol=TIGHT, atol=1e-12)
    residual = (W - (B + dB) @ A) @ A.T
    assert float(residual.norm()) < TIGHT * float((W @ A.T).norm())


@pytest.mark.parametrize("count", [2, 5])
def test_paths_in_the_ridge(count: int) -> None:
    """As the ridge grows the fit gets worse, dB shrinks, and dB obeys its bound."""
    pairs, counts = drifted(count), COUNTS[count]
    A, B, W = means(pairs, normal(counts))
    E = W - B @ A
    path = [correction(pairs, counts, ridge=ridge) for ridge in RIDGES]
    residuals = [float((E - dB @ A).norm()) for dB in path]
    sizes = [float(dB.norm()) for dB in path]
    assert residuals == sorted(residuals)
    assert sizes == sorted(sizes, reverse=True)
    for ridge, size in zip(RIDGES[1:], sizes[1:], strict=True):
        assert size <= float(E.norm()) / (2 * ridge**0.5)


@pytest.mark.parametrize("count", [2, 5])
def test_chain_of_residuals(count: int) -> None:
    """Best rank r <= no ridge <= ridge <= FedAvg, all against the mean of the products."""
    pairs, counts = drifted(count), COUNTS[count]
    A, B, W = means(pairs, normal(counts))
    best = float(torch.linalg.svdvals(W)[3:].norm())
    fits = [
        float((W - (B + correction(pairs, counts, ridge=ridge)) @ A).norm())
        for ridge in (0.0, 0.1, 10.0)
    ]
    chain = [best, *fits, float((W - B @ A).norm())]
    assert chain == sorted(chain)
    assert len(set(chain)) == len(chain)


@pytest.mark.parametrize(
    "options",
    [{}, {"ridge": 0.0}, {"solver": "cosine_sgd", "steps": 20}, {"solver": "cosine_sgd",
     "steps": 5, "init": "xavier", "cosine": "columns"}],
)  # fmt: skip
def test_a_is_the_mean_and_heads_are_the_means(options: dict[str, Any]) -> None:
    adapters, counts = [random_adapter(k) for k in range(5)], COUNTS[5]
    fair = merged(build(LoraFair, **options), adapters, counts)
    mean = merged(build(FedAvg), adapters, counts)
    for name, ab in mean.pairs.items():
        assert torch.equal(fair.pairs[name].A, ab.A)
        assert not torch.equal(fair.pairs[name].B, ab.B)
    assert all(torch.equal(fair.vectors[name], mean.vectors[name]) for name in mean.vectors)


def deficient(kind: str) -> list[LoraPair]:
    """Clients whose mean A has rank below 3, exactly or but for rounding."""
    pairs = drifted(2)
    if kind == "duplicate rows":
        return [LoraPair(torch.stack([ab.A[0], ab.A[1], ab.A[1]]), ab.B) for ab in pairs]
    if kind == "zero row":
        return [LoraPair(ab.A * torch.tensor([[1.0], [0.0], [1.0]]), ab.B) for ab in pairs]
    if kind == "dependent rows":
        mix = torch.tensor([[1.0, 0.0], [0.3, 0.7], [-1.9, 0.1]], dtype=torch.float64)
        return [LoraPair(mix @ ab.A[:2], ab.B) for ab in pairs]
    return [pairs[0], LoraPair(-pairs[0].A * 3 / 5, pairs[1].B)]  # opposing: mean A is 0


KINDS = ["duplicate rows", "zero row", "dependent rows", "opposing"]


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_mean_a(kind: str) -> None:
    """Finite, the pseudo-inverse's solution, and the limit of small ridges."""
    pairs, counts = deficient(kind), COUNTS[2]
    A, B, W = means(pairs, normal(counts))
    exact = correction(pairs, counts, ridge=0.0)
    expected = (W - B @ A) @ torch.linalg.pinv(A, rtol=1e-12)
    if kind == "opposing":
        expected = torch.zeros_like(B)  # there is no row space to correct in
    assert torch.isfinite(exact).all()
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-10)
    gaps = [
        float((correction(pairs, counts, ridge=ridge) - exact).norm())
        for ridge in (1e-2, 1e-4, 1e-6)
    ]
    if kind == "opposing":
        assert max(gaps) < 1e-10
    else:
        assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.2)
        assert gaps[2] == pytest.approx(gaps[1] / 100, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-14, 1e-20, 1e-30, 1e-300])
def test_tiny_ridge_with_a_rank_deficient_mean_a(kind: str, ridge: float) -> None:
    """A ridge below rounding is no ridge; it must not meet a singular matrix."""
    pairs, counts = deficient(kind), COUNTS[2]
    exact = correction(pairs, counts, ridge=0.0)
    found = correction(pairs, counts, ridge=ridge)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_common_rotation_commutes(ridge: float) -> None:
    pairs, counts = drifted(5), COUNTS[5]
    Q = torch.linalg.qr(random(3, 3, seed=4)).Q
    turned = [LoraPair(Q.T @ ab.A, ab.B @ Q) for ab in pairs]
    plain, other = (correction(p, counts, ridge=ridge) for p in (pairs, turned))
    torch.testing.assert_close(other, plain @ Q, rtol=TIGHT, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_rank_above_the_layers_width(ridge: float) -> None:
    """r = 5 > d_in = 4: A A^T is singular and the pseudo-inverse still right."""
    pairs, counts = [pair(k, 9, 4, rank=5) for k in range(2)], COUNTS[2]
    expected = dense_correction(pairs, normal(counts), ridge)
    torch.testing.assert_close(
        correction(pairs, counts, ridge=ridge), expected, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"ridge": 0.0}, {"solver": "cosine_sgd", "steps": 2, "cosine": "flat"},
     {"solver": "cosine_sgd", "steps": 2, "cosine": "columns"}],
)  # fmt: skip
def test_no_dense_matrix_is_formed(options: dict[str, Any]) -> None:
    d_out, d_in = 101, 211
    adapters = [Adapter({layer("wide"): pair(k, d_out, d_in)}) for k in range(3)]
    strategy = build(LoraFair, scales=None, **options)
    with Shapes() as shapes:
        strategy.merge(GlobalState(adapters[0]), updates_of(adapters, COUNTS[5][:3]))
    assert (d_out, 3) in shapes.seen
    largest = max(torch.Size(shape).numel() for shape in shapes.seen)
    assert largest <= 9 * d_in  # K r rows of A; d_out x d_in would be 21311
    assert not {(d_out, d_in), (d_in, d_out), (d_in, d_in), (d_out, d_out)} & shapes.seen
    with Shapes() as shapes:
        adapters[0].pairs[layer("wide")].delta()
    assert (d_out, d_in) in shapes.seen


def dense_loss(dB: Tensor, A: Tensor, B: Tensor, W: Tensor, ridge: float, cosine: str) -> Tensor:
    """The objective as the public code writes it."""
    product = (B + dB) @ A
    if cosine == "flat":
        likeness = cosine_similarity(W.flatten(), product.flatten(), dim=0)
    else:
        likeness = cosine_similarity(W, product, dim=0).mean()
    return 1 - likeness + ridge * dB.square().sum()


def dense_descent(
    pairs: Sequence[LoraPair], p: Sequence[float], steps: int, lr: float, ridge: float, cosine: str
) -> Tensor:
    """torch.optim.SGD on the dense objective, from zero."""
    A, B, W = means(pairs, p)
    dB = torch.zeros_like(B, requires_grad=True)
    optimizer = torch.optim.SGD([dB], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        dense_loss(dB, A, B, W, ridge, cosine).backward()
        optimizer.step()
    return dB.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cosine", ["flat", "columns"])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_cosine_descent_is_the_dense_one(
    shape: tuple[int, int], cosine: Literal["flat", "columns"], ridge: float
) -> None:
    pairs, counts = drifted(5, shape), COUNTS[5]
    expected = dense_descent(pairs, normal(counts), 60, 0.05, ridge, cosine)
    found = correction(
        pairs, counts, solver="cosine_sgd", ridge=ridge, steps=60, lr=0.05, cosine=cosine
    )
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=1e-11)


def test_columns_of_zeros_are_counted_as_torch_counts_them() -> None:
    """An input that no client uses has a zero column in every A: cosine 0, no gradient."""
    pairs = [LoraPair(torch.cat([torch.zeros(3, 2), ab.A], 1), ab.B) for ab in drifted(3)]
    counts = COUNTS[5][:3]
    expected = dense_descent(pairs, normal(counts), 40, 0.05, 0.01, "columns")
    found = correction(pairs, counts, solver="cosine_sgd", steps=40, lr=0.05, cosine="columns")
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=1e-11)


@pytest.mark.parametrize("cosine", ["flat", "columns"])
def test_descent_goes_down_and_stays_below_the_optimum(
    cosine: Literal["flat", "columns"],
) -> None:
    pairs, counts = drifted(5), COUNTS[5]
    A, B, W = means(pairs, normal(counts))
    for ridge in (0.0, 0.01):
        losses = []
        for steps in (1, 10, 100, 400):
            dB = correction(
                pairs, counts, solver="cosine_sgd", ridge=ridge, steps=steps, lr=0.05, cosine=cosine
            )
            losses.append(float(dense_loss(dB, A, B, W, ridge, cosine)))
        start = float(dense_loss(torch.zeros_like(B), A, B, W, ridge, cosine))
        assert [start, *losses] == sorted([start, *losses], reverse=True)
    if cosine == "flat":
        reached = float(cosine_similarity(W.flatten(), ((B + dB) @ A).flatten(), dim=0))
        most = float((W @ torch.linalg.pinv(A) @ A).norm() / W.norm())
        closed = (B + correction(pairs, counts, ridge=0.0)) @ A
        at_closed = float(cosine_similarity(W.flatten(), closed.flatten(), dim=0))
        before = float(cosine_similarity(W.flatten(), (B @ A).flatten(), dim=0))
        assert before < reached <= most
        assert at_closed == pytest.approx(most, rel=TIGHT)


@pytest.mark.parametrize("options", [{}, {"ridge": 0.0}, {"solver": "cosine_sgd", "steps": 30}])
def test_scale_does_not_change_the_factors(options: dict[str, Any]) -> None:
    """The rule works on unscaled factors, so the ridge does too."""
    adapters, counts = [random_adapter(k) for k in range(3)], COUNTS[5][:3]
    fair = merged(build(LoraFair, **options), adapters, counts)
    louder = [
        with_pairs(adapter, lambda ab: LoraPair(ab.A, ab.B, 8 * ab.scale)) for adapter in adapters
    ]
    loud = merged(build(LoraFair, **options), louder, counts)
    for name, ab in fair.pairs.items():
        assert torch.equal(loud.pairs[name].B, ab.B)
        assert loud.pairs[name].scale == 8 * ab.scale


def nothing_to_correct(kind: str) -> list[LoraPair]:
    pairs = drifted(3)
    if kind == "one client":
        return pairs[:1]
    if kind == "one A":
        return [LoraPair(pairs[0].A, ab.B) for ab in pairs]
    if kind == "one B":
        return [LoraPair(ab.A, pairs[0].B) for ab in pairs]
    return [LoraPair(ab.A, torch.zeros_like(ab.B)) for ab in pairs]


@pytest.mark.parametrize("kind", ["one client", "one A", "one B", "no B"])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_nothing_to_correct_is_left_alone(kind: str, ridge: float) -> None:
    pairs = nothing_to_correct(kind)
    dB = correction(pairs, COUNTS[5][: len(pairs)], ridge=ridge)
    # B_k less their mean leaves about 1e-16; one client and B = 0 leave nothing at all
    assert float(dB.norm()) == 0.0 if kind in ("one client", "no B") else float(dB.norm()) < 1e-14


@pytest.mark.parametrize("kind", ["one client", "one A", "no B"])
@pytest.mark.parametrize("cosine", ["flat", "columns"])
def test_cosine_leaves_alone_too(kind: str, cosine: Literal["flat", "columns"]) -> None:
    """From zero it stays at zero; a Xavier start would not."""
    pairs = nothing_to_correct(kind)
    options: dict[str, Any] = {"solver": "cosine_sgd", "steps": 200, "cosine": cosine}
    counts = COUNTS[5][: len(pairs)]
    assert float(correction(pairs, counts, **options).norm()) < 1e-13
    assert float(correction(pairs, counts, init="xavier", **options).norm()) > 0.5


@pytest.mark.parametrize("cosine", ["flat", "columns"])
def test_no_direction_to_start_from(cosine: Literal["flat", "columns"]) -> None:
    """Opposing B's: their mean is zero and has no angle, so descent has nothing to follow.

    The gradient of torch's guarded cosine there is 1 / eps, a step a million times too long.
    """
    a, b = drifted(2)
    opposing = [a, LoraPair(b.A, -a.B)]
    options: dict[str, Any] = {"solver": "cosine_sgd", "steps": 50, "cosine": cosine}
    assert float(correction(opposing, [1.0, 1.0], **options).norm()) < 1.0


def test_paper_code_preset() -> None:
    strategy = LoraFair.paper_code(settle=0.0)
    shown = (strategy.solver, strategy.ridge, strategy.steps, strategy.lr)
    assert shown == ("cosine_sgd", 1.0, 1000, 0.01)
    assert (strategy.init, strategy.cosine, strategy.settle) == ("xavier", "columns", 0.0)
    assert LoraFair.paper_code(steps=3, ridge=0.1).ridge == 0.1


def test_defaults() -> None:
    strategy = LoraFair()
    assert (strategy.solver, strategy.ridge, strategy.init) == ("closed_form", 0.01, "zero")
    assert (strategy.steps, strategy.lr, strategy.cosine) == (1000, 0.01, "flat")


def test_why_zero_is_the_default_start() -> None:
    """Descent cannot see dB outside A's row space of B A, so a Xavier draw fades with the ridge.

    Directions it does not see shrink by 1 - 2 lr ridge a step: to 0.82 after 1000 steps at 0.01
    (the paper's text), to 2e-9 at 1 (the public code).
    """
    common = pair(900, 40, 60, rank=4)
    pairs = [
        LoraPair(common.A + 0.3 * own.A, 0.01 * (common.B + 0.3 * own.B))
        for own in (pair(k, 40, 60, rank=4) for k in range(3))
    ]
    counts, size = [1.0, 1.0, 1.0], float(means(pairs, [1 / 3] * 3)[1].norm())
    sizes = {
        (init, ridge): float(
            correction(pairs, counts, solver="cosine_sgd", init=init, ridge=ridge).norm()
        )
        for init in ("zero", "xavier")
        for ridge in (0.01, 1.0)
    }
    assert sizes["xavier", 0.01] > size
    assert sizes["xavier", 1.0] < size
    assert sizes["zero", 0.01] < 0.5 * size


def test_xavier_draw_comes_from_seed_round_and_layer() -> None:
    adapters, counts = [random_adapter(k) for k in range(2)], COUNTS[2]
    options: dict[str, Any] = {"solver": "cosine_sgd", "steps": 1, "init": "xavier"}

    def head_of(seed: int, number: int) -> float:
        state = GlobalState(adapters[0], number)
        after = build(LoraFair, seed=seed, **options).merge(state, updates_of(adapters, counts))
        return float(after.adapter.pairs[layer("query")].B[0, 0])

    assert head_of(0, 0) == head_of(0, 0)
    assert len({head_of(0, 0), head_of(1, 0), head_of(0, 1)}) == 3
    twins = [Adapter(dict.fromkeys(["x.lora_{}", "y.lora_{}"], pair(k))) for k in range(2)]
    after = merged(build(LoraFair, scales=None, **options), twins, counts)
    assert not torch.equal(after.pairs["x.lora_{}"].B, after.pairs["y.lora_{}"].B)


@pytest.mark.parametrize(
    ("option", "value"),
    [("solver", "svd"), ("ridge", -0.1), ("ridge", float("inf")), ("steps", 0), ("lr", 0.0),
     ("init", "ones"), ("cosine", "rows")],
)  # fmt: skip
def test_options_are_checked(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"LoraFair.{option}: found"):
        LoraFair(**{option: value})
