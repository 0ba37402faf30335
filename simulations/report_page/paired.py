"""Whether the best of several rows is better than every other, tried on the seeds they share."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.05
FEWEST = 3  # seeds in common
SAME = 1e-9  # of the values: differences that vary less say nothing about how they would vary
Values = Mapping[int, float]  # one row's score of each seed


@dataclass(frozen=True)
class Against:
    """The best row against one other.

    Attributes:
        other: the other row's place.
        seeds: those in common.
        lead: mean over them of best minus other, in the score's own unit.
        interval: 95 % of the lead's t distribution, of this pair alone; None where not tested.
        p: of the two-sided paired t-test, after Holm over all others; None where not tested.
    """

    other: int
    seeds: tuple[int, ...]
    lead: float | None
    interval: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The row with the best mean, its tests, and whether all of them support it."""

    best: int
    against: tuple[Against, ...]
    supported: bool


def verdict(rows: Sequence[Values], greatest: bool) -> Verdict | None:
    """The best of rows and what speaks for it; None unless two rows have a score.

    A row is supported as the best if it leads in every other row's common seeds, at least three,
    and each paired t-test is below 0.05 after Holm's correction. Leads that are the same for
    every seed have no spread to test against, so that they support nothing.
    """
    known = [place for place, values in enumerate(rows) if values]
    if len(known) < 2:
        return None
    means = {place: statistics.fmean(rows[place].values()) for place in known}
    best = (max if greatest else min)(known, key=lambda place: means[place])
    pairs = [_against(rows, best, place) for place in known if place != best]
    against = _holm(pairs)
    supported = all(
        one.p is not None and one.p < LEVEL and one.lead is not None and (one.lead > 0) == greatest
        for one in against
    )
    return Verdict(best, tuple(against), supported)


def _against(rows: Sequence[Values], best: int, other: int) -> Against:
    """One paired t-test, not yet corrected."""
    seeds = tuple(sorted(rows[best].keys() & rows[other].keys()))
    ours, theirs = ([rows[place][seed] for seed in seeds] for place in (best, other))
    leads = [our - their for our, their in zip(ours, theirs, strict=True)]
    if not leads:
        return Against(other, seeds, None)
    lead = statistics.fmean(leads)
    size = max(map(abs, [*ours, *theirs]))
    if len(seeds) < FEWEST or statistics.stdev(leads) <= SAME * size:
        return Against(other, seeds, lead)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return Against(other, seeds, lead, (float(low), float(high)), float(test.pvalue))


def _holm(pairs: Sequence[Against]) -> list[Against]:
    """The pairs with p corrected by Holm's step-down method; what was not tested counts too."""
    tested = sorted((pair for pair in pairs if pair.p is not None), key=lambda pair: pair.p or 0.0)
    corrected, least = dict[int, float](), 0.0
    for place, pair in enumerate(tested):
        least = max(least, min(1.0, (len(pairs) - place) * (pair.p or 0.0)))
        corrected[pair.other] = least
    return [
        Against(pair.other, pair.seeds, pair.lead, pair.interval, corrected.get(pair.other))
        for pair in pairs
    ]
