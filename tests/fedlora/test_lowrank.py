"""Norms and means of low-rank products against dense float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedlora.lowrank import (
    Adapter,
    LoraPair,
    aggregation_error,
    layer_norms,
    mean_adapter,
    mean_and_error_norms,
    middle_product,
    product_distances,
    product_norm,
    relative_error,
    weighted_mean,
)
from tests.helpers import (
    Shapes,
    dense,
    dense_mean,
    normal,
    pair,
    random,
    random_adapter,
    with_pairs,
)

torch.set_num_threads(1)

TIGHT = 1e-10  # float64 sums of at most a few hundred terms
COUNTS = {1: [7.0], 2: [3.0, 5.0], 5: [1.0, 10.0, 4.0, 2.5, 7.0]}


def clients(count: int, seed: int = 1) -> list[Adapter]:
    return [random_adapter(seed + k) for k in range(count)]


def dense_error(adapters: list[Adapter], weights: list[float], merged: Adapter) -> float:
    """The aggregation error as its docstring defines it, with every matrix formed."""
    error = ideal = 0.0
    for name, ab in merged.pairs.items():
        mean = dense_mean(adapters, weights, name)
        error += float((mean - dense(ab)).square().sum())
        ideal += float(mean.square().sum())
    return (error / ideal) ** 0.5


@pytest.mark.parametrize(
    ("d_out", "d_in", "ranks"),
    [
        (7, 11, [3]),
        (11, 7, [3, 2]),
        (5, 17, [4, 4, 4]),  # R = 12 > d_out
        (6, 4, [5, 5, 5]),  # R = 15 > both
        (1, 9, [2, 1]),
        (9, 1, [2, 1]),
    ],
)
def test_product_norm_is_the_dense_norm(d_out: int, d_in: int, ranks: list[int]) -> None:
    lefts = [random(d_out, r, seed=k) for k, r in enumerate(ranks)]
    rights = [random(r, d_in, seed=100 + k) for k, r in enumerate(ranks)]
    expected = sum((L @ R for L, R in zip(lefts, rights, strict=True)), torch.zeros(d_out, d_in))
    assert product_norm(lefts, rights) == pytest.approx(float(expected.norm()), rel=TIGHT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize(("d_out", "d_in"), [(40, 60), (60, 40), (7, 11)])
def test_norms_of_mean_and_error_are_the_reference(
    d_out: int, d_in: int, size: float, shared: bool
) -> None:
    """Tall, wide, and narrower than K r; clients that differ much or little; one A for all."""
    common, weights = pair(50, d_out, d_in, 4), normal(COUNTS[5])
    uploads = [
        LoraPair(common.A if shared else common.A + size * one.A, common.B + size * one.B, 0.5 + k)
        for k, one in enumerate(pair(k, d_out, d_in, 4) for k in range(5))
    ]
    mean = sum(p * (0.5 + k) for k, p in enumerate(weights))
    merged = LoraPair(common.A, common.B, mean)
    lefts = [p * one.scale * one.B for p, one in zip(weights, uploads, strict=True)]
    rights = [one.A for one in uploads]
    of_mean, of_error = mean_and_error_norms(uploads, weights, merged)
    assert of_mean == pytest.approx(product_norm(lefts, rights), rel=TIGHT)
    reference = product_norm([*lefts, -mean * merged.B], [*rights, merged.A])
    # both round at about 1e-16 of the products' own size
    assert of_error == pytest.approx(reference, rel=1e-7 if size == 1e-8 else TIGHT)


def test_product_norm_of_nothing_is_zero() -> None:
    assert product_norm([torch.zeros(4, 2)], [random(2, 5, seed=1)]) == 0.0


def test_small_difference_of_large_products_keeps_its_digits() -> None:
    """B A - B (A + tiny) has norm ||B tiny||; a Gram matrix would square the cancellation."""
    B, A, tiny = random(9, 3, seed=1), 1e4 * random(3, 12, seed=2), random(3, 12, seed=3)
    for size in (1e-2, 1e-5, 1e-8):
        moved = A + size * tiny
        expected = float((B @ (moved - A)).norm())
        # QR errs by about 1e-16 of the products' own size, 1e5
        assert product_norm([B, -B], [moved, A]) == pytest.approx(expected, abs=1e-10)


def test_product_norm_upcasts_float32() -> None:
    B, A = random(9, 3, seed=1).float(), random(3, 12, seed=2).float()
    expected = float((B.double() @ A.double()).norm())
    assert product_norm([B], [A]) == pytest.approx(expected, rel=TIGHT)


def test_weighted_mean_adds_in_float64() -> None:
    """In float32, 1 + 2^-25 is 1: four such halves would vanish."""
    big, small = torch.ones(2), torch.full((2,), 2.0**-25)
    mean = weighted_mean([big, small, small, small, small], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert mean.dtype == torch.float32
    assert mean.tolist() == [1.0 + 2.0**-23] * 2


def test_weighted_mean_adds_in_the_given_order() -> None:
    """Float64 sums depend on their order, so clients come in a fixed one."""
    parts = [torch.tensor([value], dtype=torch.float64) for value in (1e16, 1.0, -1e16)]
    ones = [1.0, 1.0, 1.0]
    assert weighted_mean(parts, ones).item() == 0.0
    assert weighted_mean([parts[0], parts[2], parts[1]], ones).item() == 1.0


def test_weighted_mean_by_hand() -> None:
    mean = weighted_mean([torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])], [0.25, 0.75])
    assert mean.tolist() == [4.0, -1.0]
    with pytest.raises(ValueError):
        weighted_mean([torch.zeros(2)], [0.5, 0.5])


def test_weighted_mean_leaves_its_arguments() -> None:
    parts = [random(3, seed=1), random(3, seed=2)]
    before = [part.clone() for part in parts]
    weighted_mean(parts, [0.5, 0.5])
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def centred(pairs: list[LoraPair], weights: list[float]) -> Tensor:
    """``sum_k p_k (B_k - B)(A_k - A)``."""
    A = weighted_mean([ab.A for ab in pairs], weights)
    B = weighted_mean([ab.B for ab in pairs], weights)
    terms = [p * (ab.B - B) @ (ab.A - A) for p, ab in zip(weights, pairs, strict=True)]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_error_of_averaging_in_three_forms(count: int) -> None:
    pairs, weights = [pair(k) for k in range(count)], normal(COUNTS[count])
    A = weighted_mean([ab.A for ab in pairs], weights)
    B = weighted_mean([ab.B for ab in pairs], weights)
    products = [p * ab.B @ ab.A for p, ab in zip(weights, pairs, strict=True)]
    E = torch.stack(products).sum(0) - B @ A
    torch.testing.assert_close(centred(pairs, weights), E, rtol=TIGHT, atol=1e-12)
    pairwise = torch.zeros_like(E)
    for i, j in itertools.combinations(range(count), 2):
        apart = (pairs[i].B - pairs[j].B) @ (pairs[i].A - pairs[j].A)
        pairwise += weights[i] * weights[j] * apart
    torch.testing.assert_close(pairwise, E, rtol=TIGHT, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rank_of_the_error_is_at_most_one_client_less(count: int) -> None:
    """rank(E) = (K - 1) r for random clients; one client leaves nothing to correct."""
    pairs = [pair(k, d_out=19, d_in=23, rank=3) for k in range(count)]
    E = centred(pairs, normal(COUNTS[count]))
    assert int(torch.linalg.matrix_rank(E, rtol=1e-10)) == (count - 1) * 3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_aggregation_error_is_the_dense_one(count: int) -> None:
    adapters, weights = clients(count), normal(COUNTS[count])
    for merged in (mean_adapter(adapters, weights), random_adapter(99)):
        found = aggregation_error(adapters, weights, merged)
        # one client: the error is exactly zero, of which rounding leaves about 1e-16
        assert found == pytest.approx(dense_error(adapters, weights, merged), rel=TIGHT, abs=1e-14)


@pytest.mark.parametrize("count", [2, 5])
def test_the_errors_of_layers_combine_to_that_of_all(count: int) -> None:
    """Their squares' mean, weighted by the squared norms of the layers' mean changes."""
    adapters, weights = clients(count), normal(COUNTS[count])
    merged = random_adapter(99)
    norms = layer_norms(adapters, weights, merged)
    assert norms.keys() == merged.pairs.keys() and len(norms) > 1
    combined = shares = 0.0
    for name, ab in merged.pairs.items():
        alone = relative_error([norms[name]])
        one = [Adapter({name: adapter.pairs[name]}) for adapter in adapters]
        assert alone == pytest.approx(dense_error(one, weights, Adapter({name: ab})), rel=TIGHT)
        share = float(dense_mean(adapters, weights, name).square().sum())
        combined, shares = combined + share * alone**2, shares + share
    found = aggregation_error(adapters, weights, merged)
    assert found == pytest.approx((combined / shares) ** 0.5, rel=TIGHT)
    each = [relative_error([one]) for one in norms.values()]
    assert max(each) / min(each) > 1.01 and min(each) < found < max(each)


def test_no_error_when_all_share_one_factor() -> None:
    adapters, weights = clients(3), normal([1.0, 2.0, 5.0])
    first = adapters[0]
    for factor in ("A", "B"):
        shared = [
            Adapter(
                {
                    name: LoraPair(
                        first.pairs[name].A if factor == "A" else ab.A,
                        first.pairs[name].B if factor == "B" else ab.B,
                        ab.scale,
                    )
                    for name, ab in adapter.pairs.items()
                }
            )
            for adapter in adapters
        ]
        assert aggregation_error(shared, weights, mean_adapter(shared, weights)) < 1e-14


def test_each_layer_counts_with_its_own_scale() -> None:
    """Doubling one layer's scale changes the relative error; doubling all does not."""
    adapters, weights = clients(3), normal([1.0, 2.0, 5.0])

    def scaled(factors: dict[str, float]) -> float:
        changed = [
            Adapter(
                {
                    n: LoraPair(ab.A, ab.B, ab.scale * factors.get(n, 1.0))
                    for n, ab in a.pairs.items()
                }
            )
            for a in adapters
        ]
        merged = mean_adapter(changed, weights)
        assert aggregation_error(changed, weights, merged) == pytest.approx(
            dense_error(changed, weights, merged), rel=TIGHT
        )
        return aggregation_error(changed, weights, merged)

    names = list(adapters[0].pairs)
    plain = scaled({})
    assert scaled(dict.fromkeys(names, 2.0)) == pytest.approx(plain, rel=TIGHT)
    assert scaled({names[0]: 2.0}) != pytest.approx(plain, rel=1e-3)


def test_clients_of_unequal_scales_enter_with_their_own() -> None:
    adapters, weights = clients(2), [0.5, 0.5]
    doubled = with_pairs(adapters[1], lambda ab: LoraPair(ab.A, ab.B, 2 * ab.scale))
    uploads = [adapters[0], doubled]
    merged = mean_adapter(uploads, weights)
    assert merged.pairs[next(iter(merged.pairs))].scale == 0.5
    assert aggregation_error(uploads, weights, merged) == pytest.approx(
        dense_error(uploads, weights, merged), rel=TIGHT
    )


def test_nothing_changed_is_no_error_but_inventing_is() -> None:
    blank = with_pairs(random_adapter(1), lambda ab: LoraPair(ab.A, torch.zeros_like(ab.B)))
    assert aggregation_error([blank, blank], [0.5, 0.5], blank) == 0.0
    assert aggregation_error([blank, blank], [0.5, 0.5], random_adapter(1)) == float("inf")
    heads = Adapter({}, random_adapter(1).vectors)
    assert aggregation_error([heads], [1.0], heads) == 0.0


def test_common_gauge_leaves_the_mean_but_own_gauges_do_not() -> None:
    """(B Q, Q^-1 A) is the same client; the mean of factors only knows it if all turn alike."""
    adapters, weights = clients(3), normal([1.0, 2.0, 5.0])
    turns = [random(3, 3, seed=50 + k) + 3 * torch.eye(3, dtype=torch.float64) for k in range(3)]

    def turned(gauges: list[Tensor]) -> list[Adapter]:
        return [
            with_pairs(
                adapter, lambda ab, Q=Q: LoraPair(torch.linalg.solve(Q, ab.A), ab.B @ Q, ab.scale)
            )
            for adapter, Q in zip(adapters, gauges, strict=True)
        ]

    plain = mean_adapter(adapters, weights)
    common = mean_adapter(turned([turns[0]] * 3), weights)
    own = mean_adapter(turned(turns), weights)
    for name, ab in plain.pairs.items():
        torch.testing.assert_close(dense(common.pairs[name]), dense(ab), rtol=TIGHT, atol=1e-12)
        assert not torch.allclose(dense(own.pairs[name]), dense(ab), rtol=1e-3)
        for adapter, other in zip(adapters, turned(turns), strict=True):
            torch.testing.assert_close(
                dense(other.pairs[name]), dense(adapter.pairs[name]), rtol=TIGHT, atol=1e-12
            )


def test_energy_of_pure_noise() -> None:
    """With independent factors of variance t^2 around zero, K products keep K times the energy.

    E||sum p B_k A_k||^2 = r t^4 d_out d_in / K and E||B A||^2 = r t^4 d_out d_in / K^2.
    """
    d_out, d_in, r, K, t, draws = 24, 40, 4, 5, 0.1, 150
    of_mean = of_products = 0.0
    for draw in range(draws):
        A = t * random(K, r, d_in, seed=2 * draw)
        B = t * random(K, d_out, r, seed=2 * draw + 1)
        of_products += float((B @ A).mean(0).square().sum()) / draws
        of_mean += float((B.mean(0) @ A.mean(0)).square().sum()) / draws
    energy = r * t**4 * d_out * d_in
    # the standard deviation of one draw's energy is about 0.2 of it, of 150 draws' mean 0.02
    assert of_products == pytest.approx(energy / K, rel=0.05)
    assert of_mean == pytest.approx(energy / K**2, rel=0.05)


def test_pair_of_two_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A is \[3, 5\] and B is \[4, 2\]"):
        LoraPair(torch.zeros(3, 5), torch.zeros(4, 2))
    with pytest.raises(ValueError):
        LoraPair(torch.zeros(3), torch.zeros(4, 3))


def test_delta_of_a_pair_by_hand() -> None:
    ab = LoraPair(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0], [-1.0]]), 0.5)
    assert ab.delta().tolist() == [[1.5, 3.0, 0.0], [-0.5, -1.0, 0.0]]


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0, 1.0), (0.5, 2.0, -1.0, 3.0)])
def test_product_distances_are_dense_ones(scales: tuple[float, ...]) -> None:
    pairs = [pair(k, scale=scale) for k, scale in enumerate(scales)]
    found = product_distances(pairs)
    for i, j in itertools.product(range(4), repeat=2):
        expected = float((dense(pairs[i]) - dense(pairs[j])).square().sum())
        assert float(found[i, j]) == pytest.approx(expected, rel=TIGHT, abs=1e-12)


def test_near_products_are_told_apart_down_to_what_is_said() -> None:
    """Moved by 1e-5 of its norm, a product is seen to move; the square keeps five digits."""
    one = pair(1)
    other = LoraPair(one.A, (1 + 1e-5) * one.B)
    found = float(product_distances([one, other])[0, 1])
    assert found == pytest.approx(1e-10 * float(dense(one).square().sum()), rel=1e-4)


@pytest.mark.parametrize("block", [1, 60, 10**9])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_middle_of_products_in_blocks(block: int, cut: int) -> None:
    """The same bits whatever the block, and of all K products never more than a block."""
    pairs = [pair(k, 8, 11, scale=0.5 + k) for k in range(5)]
    with Shapes() as shapes:
        found = middle_product(pairs, cut, block)
    ordered = torch.stack([dense(ab) for ab in pairs]).sort(dim=0).values
    expected = ordered[cut : 5 - cut].mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=1e-14)
    rows = {shape[1] for shape in shapes.seen if len(shape) == 3 and shape[::2] == (5, 11)}
    assert max(rows - {3}) == min(8, max(1, block // 55))  # A itself has r = 3 rows
