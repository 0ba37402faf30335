"""The fast closed form against its reference, and where each would lose its digits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedlora.lowrank import LoraPair, weighted_sum
from fedlora.ridge import Drift, RowSpace, corrected_mean, ridge_correction, sum_and_size
from tests.helpers import normal, pair, random, relative

torch.set_num_threads(1)

COUNTS = [1.0, 10.0, 4.0, 2.5, 7.0]
RIDGES = [0.0, 1e-6, 0.01, 1.0]


def clients(kind: str, count: int = 5) -> list[LoraPair]:
    """Clients whose mean A is well or badly conditioned, or who differ little."""
    common, own = pair(900, 40, 60, 4), [pair(k, 40, 60, 4) for k in range(count)]
    size = {"near": 1e-3, "very near": 2.0**-20}.get(kind, 0.7)
    pairs = [LoraPair(common.A + size * one.A, common.B + size * one.B) for one in own]
    if kind.startswith("condition"):
        rows = torch.logspace(0, -float(kind.removeprefix("condition ")), 4, dtype=torch.float64)
        turn = torch.linalg.qr(random(4, 4, seed=7)).Q
        return [LoraPair(turn @ (rows[:, None] * one.A), one.B) for one in pairs]
    if kind == "wide rank":
        return [pair(k, 9, 4, rank=6) for k in range(count)]
    if kind == "deficient":
        mix = random(4, 2, seed=8)
        return [LoraPair(mix @ one.A[:2], one.B) for one in pairs]
    return pairs


def expected(pairs: Sequence[LoraPair], p: Sequence[float], ridge: float) -> torch.Tensor:
    return weighted_sum([one.B for one in pairs], p) + ridge_correction(pairs, p, ridge)


KINDS = ["far", "near", "very near", "condition 3", "condition 6", "wide rank", "deficient"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_fast_form_is_the_reference(kind: str, ridge: float, count: int) -> None:
    pairs, p = clients(kind, count), normal(COUNTS[:count])
    found, reference = corrected_mean(pairs, p, ridge), expected(pairs, p, ridge)
    # rounding at 1e-16, times the condition of A: 10^3 and 10^6, and some ones
    allowed = {"condition 3": 2e-12, "condition 6": 2e-9}.get(kind, 2e-14)
    assert relative(found.B, reference) < allowed
    assert torch.equal(found.A, weighted_sum([one.A for one in pairs], p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", RIDGES)
def test_in_float32_it_is_the_reference_rounded_once(kind: str, ridge: float) -> None:
    """Sums are float64, so of the largest numbers the last digit differs at most."""
    pairs = [LoraPair(one.A.float(), one.B.float(), 0.5) for one in clients(kind)]
    p = normal(COUNTS)
    found, reference = corrected_mean(pairs, p, ridge), expected(pairs, p, ridge).float()
    assert (found.A.dtype, found.B.dtype, found.scale) == (torch.float32, torch.float32, 0.5)
    apart = float((found.B - reference).abs().max() / reference.abs().max())
    assert apart <= torch.finfo(torch.float32).eps


def test_small_drift_keeps_its_digits() -> None:
    """E is 1e-12 of the products; formed as their difference it would have four digits left."""
    common, p, size = pair(900), [0.25, 0.75], 2.0**-20
    pairs = [LoraPair(common.A + size * s.A, common.B + size * s.B) for s in (pair(1), pair(2))]
    A, length = sum_and_size(pairs, p)
    apart = p[0] * p[1] * (pairs[0].B - pairs[1].B) @ (pairs[0].A - pairs[1].A)  # E, pairwise
    exact = apart @ torch.linalg.pinv(A)
    torch.testing.assert_close(ridge_correction(pairs, p, 0.0), exact, rtol=1e-7, atol=0.0)
    rows = RowSpace.of(A, length, 0.0)
    drift = Drift.of(pairs, p, rows.V, rows.AV)
    change = (drift.BX - drift.B @ drift.X) @ rows.solve
    torch.testing.assert_close(change, exact, rtol=1e-7, atol=0.0)
    assert torch.equal(drift.corrected(rows), drift.B + change)


def test_factors_of_huge_and_tiny_numbers() -> None:
    """Norms are taken in float64: 1e30 squared is no float32, nor is 1e-30 squared."""
    for size in (1e-30, 1e30):
        pairs = [LoraPair((size * one.A).float(), one.B.float()) for one in clients("far")]
        p = normal(COUNTS)
        reference = expected(pairs, p, 0.0).float()
        torch.testing.assert_close(corrected_mean(pairs, p, 0.0).B, reference, rtol=1e-6, atol=0)
