"""The mark of the best, against scipy by hand."""

from __future__ import annotations

import numpy
import pytest
from scipy import stats

from simulations.report_page.paired import Values, verdict


def by_seed(*values: float) -> dict[int, float]:
    """A row's scores, of seeds 0, 1, ..."""
    return dict(enumerate(values))


BEST = by_seed(0.80, 0.82, 0.84)
NEAR = by_seed(0.78, 0.795, 0.825)  # leads 0.02, 0.025, 0.015: t = 0.02 / (0.005 / sqrt 3) = 6.93
FAR = by_seed(0.50, 0.53, 0.53)


def test_a_lead_that_every_test_supports_is_marked() -> None:
    found = verdict([NEAR, BEST, FAR], greatest=True)
    assert found is not None
    assert (found.best, found.supported) == (1, True)
    near, far = found.against
    raw = [stats.ttest_rel([*BEST.values()], [*other.values()]).pvalue for other in (NEAR, FAR)]
    assert raw[0] == pytest.approx(2 * stats.t.sf(48**0.5, 2))  # 6.93 is the root of 48
    assert raw[1] < raw[0] < 0.05
    # Holm: the smaller p is doubled, the greater is kept but for being no smaller than that
    assert far.p == pytest.approx(2 * raw[1])
    assert near.p == pytest.approx(max(2 * raw[1], raw[0]))
    assert near.lead == pytest.approx(0.02)
    half = stats.t.ppf(0.975, 2) * 0.005 / 3**0.5
    assert near.interval == pytest.approx((0.02 - half, 0.02 + half))


def test_one_test_that_does_not_support_it_takes_the_mark() -> None:
    level = by_seed(0.79, 0.83, 0.80)  # beats the best on one seed
    found = verdict([BEST, level, FAR], greatest=True)
    assert found is not None
    assert (found.best, found.supported) == (0, False)
    raw = stats.ttest_rel([*BEST.values()], [*level.values()]).pvalue
    assert found.against[0].p == pytest.approx(raw)
    assert raw > 0.05


def test_the_correction_can_take_the_mark() -> None:
    """p = 0.037 supports a lead over one row, and not one over two such rows."""
    other = by_seed(0.78, 0.795, 0.8275)
    alone = verdict([BEST, other], greatest=True)
    beside = verdict([BEST, other, dict(other)], greatest=True)
    assert alone is not None and beside is not None
    assert alone.supported and not beside.supported
    assert beside.against[0].p == pytest.approx(2 * (alone.against[0].p or 0))


def test_of_losses_the_least_is_the_best() -> None:
    found = verdict([BEST, FAR], greatest=False)
    assert found is not None
    assert (found.best, found.supported) == (1, True)
    assert found.against[0].lead is not None and found.against[0].lead < 0


@pytest.mark.parametrize(
    "other",
    [
        by_seed(0.5, 0.6),  # two seeds in common
        {7: 0.5, 8: 0.6, 9: 0.4},  # none
        by_seed(0.79, 0.81, 0.83),  # the same lead for every seed: nothing to test against
        by_seed(0.80, 0.82, 0.84),  # no lead at all
    ],
    ids=["two seeds", "other seeds", "no spread", "equal"],
)
def test_what_cannot_be_tested_supports_nothing(other: Values) -> None:
    found = verdict([BEST, other], greatest=True)
    assert found is not None
    assert not found.supported
    assert found.against[0].p is None


def test_one_that_cannot_be_tested_still_counts_in_the_correction() -> None:
    found = verdict([BEST, NEAR, by_seed(0.5)], greatest=True)
    assert found is not None
    assert not found.supported
    raw = stats.ttest_rel([*BEST.values()], [*NEAR.values()]).pvalue
    assert found.against[0].p == pytest.approx(2 * raw)


def test_behind_on_the_seeds_in_common_is_no_lead() -> None:
    """The best mean may come from a seed that the other row does not have."""
    best = {0: 0.50, 1: 0.51, 2: 0.52, 3: 0.99}
    found = verdict([best, by_seed(0.55, 0.565, 0.57)], greatest=True)
    assert found is not None
    assert found.best == 0
    assert found.against[0].p is not None and found.against[0].p < 0.05
    assert not found.supported


def test_a_single_row_is_no_comparison() -> None:
    assert verdict([BEST, {}], greatest=True) is None


def test_equal_rules_are_seldom_marked() -> None:
    """Of 400 comparisons of equal rules, 5 % may be marked: fewer than 50 but once in a million."""
    random = numpy.random.default_rng(0)
    marked = 0
    for _ in range(400):
        shared = random.normal(size=3)  # what seeds have in common goes out of the differences
        rows = [dict(enumerate(shared + random.normal(size=3))) for _ in range(3)]
        found = verdict(rows, greatest=True)
        marked += found is not None and found.supported
    assert stats.binom.sf(49, 400, 0.05) < 1e-6
    assert marked < 50
