"""Fixed point: off by half a level at most, and no sum that is allowed wraps."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from fedlora.config_secure import SecureConfig
from fedlora.errors import ConfigError, WireError
from fedlora.fixed_point import FixedPoint, clear_sums

WAYS = [(16.0, 32, 2**20, 4096), (4.0, 16, 1024, 63), (0.5, 2, 1, 2), (1e-3, 24, 77, 1000)]


@pytest.mark.parametrize(("clip", "bits", "examples", "clients"), WAYS)
def test_a_weighted_mean_of_levels_is_off_by_half_a_level(
    clip: float, bits: int, examples: int, clients: int
) -> None:
    """Each ``|level step - x| <= step / 2``, and weights that sum to 1 keep that."""
    fixed, draw = FixedPoint(clip, bits, examples, clients), numpy.random.default_rng(1)
    count = min(clients, 20)
    weights = [int(n) for n in draw.integers(1, examples + 1, count)]
    values = draw.uniform(-clip, clip, (count, 50))
    values[0, :3] = clip, -clip, 0.0
    words = [fixed.words(fixed.levels(v, "x"), n) for v, n in zip(values, weights, strict=True)]
    total = fixed.whole(numpy.sum(words, axis=0, dtype=fixed.dtype))
    assert total.tolist() == clear_sums(values.tolist(), weights, fixed)
    mean = numpy.average(values, axis=0, weights=weights)
    off = numpy.abs(total * fixed.step / sum(weights) - mean).max()
    assert fixed.step / 20 < off <= fixed.step / 2 * (1 + 1e-9) + 1e-15 * clip


@pytest.mark.parametrize(("clip", "bits", "examples", "clients"), WAYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_does_not_wrap(
    clip: float, bits: int, examples: int, clients: int, sign: int
) -> None:
    fixed = FixedPoint(clip, bits, examples, clients)
    one = fixed.words(fixed.levels(numpy.array([sign * clip]), "x"), examples)
    total = numpy.sum([one] * clients, axis=0, dtype=fixed.dtype)
    assert fixed.whole(total).tolist() == [sign * clients * examples * fixed.largest]


def test_words_are_as_wide_as_sums_need() -> None:
    assert [FixedPoint(*way).dtype for way in WAYS] == ["uint64", "uint32", "uint32", "uint64"]
    fits, wide = FixedPoint(1.0, 16, 1024, 64), FixedPoint(1.0, 16, 1024, 65)
    assert (fits.dtype, wide.dtype) == ("uint32", "uint64")


def test_what_could_wrap_is_refused() -> None:
    assert FixedPoint(16.0, 32, 2**20, 4096).dtype == "uint64"
    with pytest.raises(ConfigError, match=r"secure.examples: found 1048576, allowed: at most 1048"):
        FixedPoint(16.0, 32, 2**20, 4097)
    for wrong in [(0.0, 8, 1, 2), (float("inf"), 8, 1, 2), (1.0, 1, 1, 2), (1.0, 33, 1, 2)]:
        with pytest.raises(ConfigError, match=r"allowed: a finite clip and 2 to 32 bits"):
            FixedPoint(*wrong)


@pytest.mark.parametrize("value", [1.0001, -1.0001, float("nan"), float("inf")])
def test_a_value_beyond_the_clip_is_named_not_cut(value: float) -> None:
    fixed = FixedPoint(1.0, 32, 10, 10)
    assert fixed.levels(numpy.array([1.0, -1.0]), "x").tolist() == [fixed.largest, -fixed.largest]
    with pytest.raises(WireError, match=r"'x' holds a value of .*allowed: at most 1 \(secure.clip"):
        fixed.levels(numpy.array([0.5, value]), "x")


def test_the_threshold_is_more_than_its_share() -> None:
    needed = SecureConfig().needed
    counts = (2, 3, 4, 5, 6, 9, 10, 99, 100)
    assert [needed(count) for count in counts] == [2, 3, 3, 4, 5, 7, 7, 67, 67]
    assert SecureConfig(threshold=0.8).needed(10) == 9
    bad: list[dict[str, Any]] = [{"threshold": 0.6}, {"threshold": 1.0}, {"bits": 33}, {"clip": 0}]
    for options in bad:
        with pytest.raises(ValueError):
            SecureConfig(**options)
