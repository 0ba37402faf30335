"""FedAvg: the mean of each tensor by itself, by examples."""

from __future__ import annotations

import pytest
import torch

from fedlora.lowrank import Adapter, LoraPair
from strategies import FedAvg
from tests.helpers import (
    build,
    dense,
    dense_mean,
    layer,
    layout_of,
    merged,
    normal,
    play,
    random_adapter,
    record_of,
    reply,
)

torch.set_num_threads(1)

COUNTS = {1: [7.0], 2: [3.0, 5.0], 5: [1.0, 10.0, 4.0, 2.5, 7.0]}
NAME, HEAD = layer("query"), "base_model.model.classifier.weight"


def test_by_hand() -> None:
    """Shares 1/4 and 3/4; the product of the means is not the mean of the products."""
    first = Adapter(
        {NAME: LoraPair(torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0], [0.0], [4.0]]))},
        {HEAD: torch.tensor([1.0, 5.0])},
    )
    second = Adapter(
        {NAME: LoraPair(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0], [4.0], [4.0]]))},
        {HEAD: torch.tensor([5.0, 1.0])},
    )
    script = [reply(record_of(first), 20), reply(record_of(second), 60)]
    done = play(build(FedAvg, scales=None), first, script)
    found = layout_of(first).unpack(done.arrays)
    assert found.pairs[NAME].A.tolist() == [[1.0, 3.0]]
    assert found.pairs[NAME].B.tolist() == [[1.0], [3.0], [4.0]]
    assert found.vectors[HEAD].tolist() == [4.0, 2.0]
    # mean of products [[4, 0], [0, 12], [4, 12]], of squares 320;
    # product of means [[1, 3], [3, 9], [4, 12]]: off by [[3, -3], [-3, 3], [0, 0]], of squares 36
    assert done.records[1].aggregation_error == pytest.approx((36 / 320) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_linear_in_the_uploads(count: int) -> None:
    """merge(a x + b y) = a merge(x) + b merge(y), tensor by tensor."""
    x = [random_adapter(k) for k in range(count)]
    y = [random_adapter(50 + k) for k in range(count)]

    def mixed(one: Adapter, other: Adapter) -> Adapter:
        return Adapter(
            {
                name: LoraPair(
                    2 * ab.A - 3 * other.pairs[name].A, 2 * ab.B - 3 * other.pairs[name].B, ab.scale
                )
                for name, ab in one.pairs.items()
            },
            {name: 2 * v - 3 * other.vectors[name] for name, v in one.vectors.items()},
        )

    found = merged(build(FedAvg), [mixed(a, b) for a, b in zip(x, y, strict=True)], COUNTS[count])
    expected = mixed(
        merged(build(FedAvg), x, COUNTS[count]), merged(build(FedAvg), y, COUNTS[count])
    )
    for name, ab in expected.pairs.items():
        torch.testing.assert_close(found.pairs[name].A, ab.A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.pairs[name].B, ab.B, rtol=1e-10, atol=1e-12)
    for name, vector in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_averaging_loses_is_the_centred_sum(count: int) -> None:
    """sum p B_k A_k - B A = sum p (B_k - B)(A_k - A), through the rule itself."""
    adapters, weights = [random_adapter(k) for k in range(count)], normal(COUNTS[count])
    found = merged(build(FedAvg), adapters, COUNTS[count])
    for name, ab in found.pairs.items():
        uploads = [adapter.pairs[name] for adapter in adapters]
        centred = torch.stack(
            [
                p * ab.scale * (u.B - ab.B) @ (u.A - ab.A)
                for p, u in zip(weights, uploads, strict=True)
            ]
        ).sum(0)
        lost = dense_mean(adapters, weights, name) - dense(ab)
        torch.testing.assert_close(lost, centred, rtol=1e-10, atol=1e-12)


def test_float32_means_are_rounded_once() -> None:
    """Each number is the float64 mean rounded to float32, not a float32 sum."""
    adapters = [random_adapter(k, dtype=torch.float32) for k in range(5)]
    found = merged(build(FedAvg), adapters, COUNTS[5])
    for factor in ("A", "B"):
        stack = torch.stack([getattr(a.pairs[NAME], factor).double() for a in adapters])
        mean = (torch.tensor(normal(COUNTS[5]), dtype=torch.float64)[:, None, None] * stack).sum(0)
        assert torch.equal(getattr(found.pairs[NAME], factor), mean.float())
