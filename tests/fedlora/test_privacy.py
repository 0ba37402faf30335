"""Prices, noise and plans, against Opacus' own accountants and dp-accounting."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time

import numpy
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from fedlora import privacy
from fedlora.calibration import calibrate, plan
from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy import Accountant, PrivacyEvent, epsilon

DELTA = 1e-5

# (q, sigma, steps): opacus rdp, opacus prv, dp-accounting pld, at delta 1e-5
GOLDEN = {
    (0.04, 1.5, 2250): (7.329, 6.779, 6.769),
    (0.01, 1.0, 1000): (2.101, 1.838, 1.828),
    (1.0, 5.0, 50): (7.077, 6.583, 6.573),
    (0.1, 0.6, 200): (32.548, 29.375, 29.363),
    (0.16, 1.0, 700): (38.689, 36.020, 36.009),
}


def oracle(q: float, sigma: float, steps: int, delta: float, step: float = 1e-4) -> float:
    """dp-accounting's PLD, without our code."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, step)
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(delta))


def price(q: float, sigma: float, steps: int, accountant: Accountant = "prv") -> float:
    return epsilon([PrivacyEvent(q, sigma, steps)], DELTA, accountant)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_numbers(case: tuple[float, float, int]) -> None:
    rdp, prv, pld = GOLDEN[case]
    # Half a unit of the last digit written; larger RDP orders change none of these.
    assert price(*case, "rdp") == pytest.approx(rdp, abs=6e-4)
    assert price(*case, "prv") == pytest.approx(prv, abs=6e-4)
    assert price(*case, "pld") == pytest.approx(pld, abs=6e-4)


def test_opacus_own_golden_numbers() -> None:
    assert price(0.04, 1.5, 2250, "rdp") == pytest.approx(7.32911117143, abs=1e-9)
    assert price(0.04, 1.5, 2249, "prv") == pytest.approx(6.777395712150674, abs=1e-6)


def test_the_bounds_are_in_their_order() -> None:
    for q in (0.02, 1.0):
        for sigma in (0.8, 3.0):
            for steps in (1, 300):
                rdp, prv, pld = (price(q, sigma, steps, name) for name in ("rdp", "prv", "pld"))
                case = (q, sigma, steps, rdp, prv, pld)
                if prv != rdp:  # else it fell back
                    assert abs(prv - pld) <= 0.02, case
                assert pld <= prv + 0.001, case
                assert prv <= rdp + 0.02, case  # PRV adds 0.01 to every answer


def check_random(cases: int, seed: int, step: float) -> None:
    """PRV within 0.02 or 1 % of the oracle, and never under it by more than 0.001."""
    draw = random.Random(seed)
    exact = 0
    for _ in range(cases):
        q = min(1.0, 10 ** draw.uniform(-3, 0.1))
        sigma, steps = 10 ** draw.uniform(-0.3, 0.7), round(10 ** draw.uniform(0, 3.5))
        delta = 10 ** draw.uniform(-7, -4)
        event = PrivacyEvent(q, sigma, steps)
        ours, truth = epsilon([event], delta, "prv"), oracle(q, sigma, steps, delta, step)
        assert ours >= truth - 0.001, (event, delta)
        assert epsilon([event], delta, "rdp") >= truth - 0.001, (event, delta)
        if ours != epsilon([event], delta, "rdp"):
            exact += 1
            assert ours <= truth + max(0.02, 0.01 * truth), (event, delta)
    assert exact >= 0.9 * cases


def test_random_events_agree_with_dp_accounting() -> None:
    check_random(10, seed=1, step=5e-4)


@pytest.mark.slow
def test_two_hundred_random_events_agree_with_dp_accounting() -> None:
    check_random(200, seed=2, step=5e-4)


def test_the_reset_illusion() -> None:
    a_round = PrivacyEvent(0.04, 1.0, 25)
    for rounds, truth in ((1, 2.226), (10, 4.721), (50, 10.488)):
        assert epsilon([a_round] * rounds, DELTA, "rdp") == pytest.approx(truth, abs=6e-4)
    assert epsilon([a_round] * 50, DELTA, "prv") == pytest.approx(9.624, abs=6e-4)


def test_rounds_add_up_in_any_order_and_grouping() -> None:
    one, other = PrivacyEvent(0.04, 1.0, 25), PrivacyEvent(0.1, 2.0, 10)
    whole = [PrivacyEvent(0.04, 1.0, 75), PrivacyEvent(0.1, 2.0, 20)]
    for name in ("rdp", "prv", "pld"):
        found = {
            epsilon([one, other, one, other, one], DELTA, name),
            epsilon([other, other, one, one, one], DELTA, name),
            epsilon(whole, DELTA, name),
        }
        assert len(found) == 1


def test_different_events_compose() -> None:
    events = [PrivacyEvent(0.04, 1.5, 50), PrivacyEvent(0.2, 4.0, 20), PrivacyEvent(1.0, 9.0, 3)]
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        inner = GaussianDpEvent(event.noise_multiplier)
        accountant.compose(PoissonSampledDpEvent(event.sample_rate, inner), event.steps)
    truth = accountant.get_epsilon(DELTA)
    opacus = {"prv": PRVAccountant(), "rdp": RDPAccountant()}
    for other in opacus.values():
        other.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    assert epsilon(events, DELTA, "pld") == pytest.approx(truth, abs=1e-9)
    for name in ("prv", "rdp"):
        with numpy.errstate(all="ignore"):
            theirs = opacus[name].get_epsilon(DELTA)
        assert epsilon(events, DELTA, name) == pytest.approx(theirs, abs=1e-6)
    assert truth < epsilon(events, DELTA, "prv") < epsilon(events, DELTA, "rdp")


def test_extreme_events_end_soon_and_are_not_understated() -> None:
    started = time.monotonic()
    for case in ((1.0, 0.3, 1000), (0.5, 0.1, 100), (1e-4, 0.02, 1), (0.3, 1.0, 10**7)):
        assert price(*case, "prv") == price(*case, "rdp") > 50, case
    assert price(1.0, 0.3, 1000, "pld") <= price(1.0, 0.3, 1000, "rdp")
    tiny = [PrivacyEvent(0.0068, 0.7, 400)]  # here Opacus' PRV is at the mercy of rounding
    assert epsilon(tiny, 1e-13, "prv") == epsilon(tiny, 1e-13, "rdp")
    assert 0 <= price(1e-6, 1000.0, 1, "rdp") < 0.05
    assert 0 <= price(1e-6, 1000.0, 1, "prv") < 0.05
    assert time.monotonic() - started < 20


def test_nothing_done_costs_nothing() -> None:
    assert epsilon([], DELTA, "prv") == 0.0


def test_gdp_is_refused() -> None:
    for events in ([], [PrivacyEvent(0.01, 1.0, 1000)]):
        with pytest.raises(PrivacyError, match=r"gdp.*understates"):
            epsilon(events, DELTA, "gdp")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="gdp"):
        calibrate(8.0, DELTA, 0.1, 10, "gdp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"accountant.*'moments'"):
        epsilon([], DELTA, "moments")  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_is_between_0_and_1(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon([PrivacyEvent(0.1, 1.0, 1)], delta, "rdp")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("sample_rate", math.nan),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.inf),
        ("noise_multiplier", math.nan),
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
    ],
)
def test_an_event_checks_its_numbers(field: str, value: float) -> None:
    good = {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 5}
    with pytest.raises(ConfigError, match=field):
        PrivacyEvent(**(good | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other", [{"mechanism": "shuffled_gaussian"}, {"relation": "replace_one"}], ids=str
)
def test_an_event_that_cannot_be_priced_is_refused(other: dict[str, str]) -> None:
    with pytest.raises(PrivacyError, match=next(iter(other.values()))):
        PrivacyEvent(0.1, 1.0, 5, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("examples", [5, 20, 50, 200, 1000])
def test_calibrated_noise_spends_what_was_asked_for(examples: int) -> None:
    q, steps = min(1.0, 8 / examples), 20 * math.ceil(examples / 8)
    sigma = calibrate(8.0, DELTA, q, steps)
    assert 7.6 < price(q, sigma, steps) <= 8.0
    assert oracle(q, sigma, steps, DELTA, 1e-3) <= 8.0  # without the 0.01 that PRV adds


@pytest.mark.parametrize("accountant", ["rdp", "pld", "prv"])
@pytest.mark.parametrize("target", [0.2, 1.0, 20.0])
def test_calibration_keeps_its_range(accountant: Accountant, target: float) -> None:
    sigma = calibrate(target, DELTA, 0.1, 100, accountant)
    assert 0.95 * target < price(0.1, sigma, 100, accountant) <= target
    assert oracle(0.1, sigma, 100, DELTA, 1e-3) <= target + 0.002  # its grid adds up to 0.001


def test_a_coarse_grid_does_not_waste_a_small_target() -> None:
    for accountant in ("prv", "rdp"):
        sigma = calibrate(0.05, DELTA, 0.005, 3000, accountant)
        assert 0.0475 < price(0.005, sigma, 3000, accountant) <= 0.05


def test_calibration_where_the_price_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(privacy.PRICES, "prv", lambda runs, delta: 9.0 if runs[0][1] < 2 else 5.0)
    assert calibrate(7.0, 1.25e-5, 0.1, 100) == pytest.approx(2.0, rel=2e-4)
    calibrate.cache_clear()
    privacy.price.cache_clear()


def test_what_no_noise_can_do_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon 0\.001: .*more than 1000"):
        calibrate(0.001, DELTA, 1.0, 1000)
    with pytest.raises(PrivacyError, match=r"less than 0\.01"):
        calibrate(1e9, DELTA, 1.0, 1)
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate(0.0, DELTA, 0.1, 10)


def test_calibration_is_cached() -> None:
    first = calibrate(6.0, DELTA, 0.3, 20)
    before = calibrate.cache_info()
    assert calibrate(6.0, DELTA, 0.3, 20) == first
    after = calibrate.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    assert calibrate(6.0, 1e-6, 0.3, 20) > first


def test_a_plan_gives_every_client_the_same_epsilon() -> None:
    sizes = [200, 5, 50, 200]
    steps = [math.ceil(size / 8) for size in sizes]
    plans = plan(
        sizes,
        batch_size=8,
        rounds=4,
        steps_per_round=steps,
        epsilon=8.0,
        noise_multiplier=None,
        delta=DELTA,
    )
    assert [row.client for row in plans] == [0, 1, 2, 3]
    assert [row.examples for row in plans] == sizes
    assert [row.sample_rate for row in plans] == [8 / 200, 1.0, 8 / 50, 8 / 200]
    assert [row.steps for row in plans] == [100, 4, 28, 100]
    assert all(7.6 < row.epsilon <= 8.0 and row.delta == DELTA for row in plans)
    assert plans[0].noise_multiplier == plans[3].noise_multiplier
    assert plans[1].noise_multiplier > plans[2].noise_multiplier > plans[0].noise_multiplier
    for row in plans:
        assert row.epsilon == price(row.sample_rate, row.noise_multiplier, row.steps)


def test_shared_noise_is_the_largest_and_keeps_everybody_within() -> None:
    sizes = [200, 5, 50]
    own, shared = (
        plan(
            sizes,
            batch_size=8,
            rounds=4,
            steps_per_round=5,
            epsilon=8.0,
            noise_multiplier=None,
            delta=DELTA,
            shared_noise=shared,
        )
        for shared in (False, True)
    )
    largest = max(row.noise_multiplier for row in own)
    assert {row.noise_multiplier for row in shared} == {largest}
    assert shared[1] == own[1]  # who needed the most
    assert shared[0].epsilon < shared[2].epsilon < shared[1].epsilon <= 8.0


def small_plan(sizes: list[int], delta: float, **options: float | None) -> list[float]:
    given = {"epsilon": None, "noise_multiplier": None} | options
    rows = plan(sizes, batch_size=8, rounds=2, steps_per_round=3, delta=delta, **given)  # type: ignore[arg-type]
    return [row.epsilon for row in rows]


def test_given_noise_is_priced() -> None:
    assert small_plan([20, 4], DELTA, noise_multiplier=2.0) == [
        price(0.4, 2.0, 6),
        price(1.0, 2.0, 6),
    ]


def test_delta_of_one_over_n_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"client 1: delta 0\.01 is not below 1/100.*smaller"):
        small_plan([50, 100, 200], 0.01, noise_multiplier=2.0)
    assert small_plan([50, 99], 0.01, noise_multiplier=2.0)


def test_a_plan_needs_one_of_epsilon_and_noise() -> None:
    for options in ({}, {"epsilon": 8.0, "noise_multiplier": 1.0}):
        with pytest.raises(ConfigError, match="one of epsilon and noise_multiplier"):
            small_plan([20], DELTA, **options)


def test_accountants_are_imported_only_when_something_is_priced() -> None:
    code = "import sys, fedlora.privacy; print({'opacus', 'dp_accounting'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
