"""Rules and clients of several ranks: the laws of merging hold at whatever ranks they have."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from flwr.app import ArrayRecord

from fedlora.base_change import widened
from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter, LoraPair
from fedlora.ranks import cut, narrowed, scale_ratio, unpacked
from fedlora.rounds import GlobalState
from fedlora.sums import MeanSums, RidgeSums
from fedlora.sums_order import Limits, SumsOrder
from fedlora.wire import Layout
from strategies import METHODS, ClientPrivacy, LoraStrategy
from tests.helpers import (
    SCALES,
    Played,
    bits,
    build,
    dense,
    dense_mean,
    difference,
    merged,
    normal,
    play,
    random_adapter,
    record_of,
    relative,
    reply,
    updates_of,
)

torch.set_num_threads(1)
TAKE = [name for name, rule in METHODS.items() if rule.mixed_ranks.way != "no"]
REFUSE = [name for name in METHODS if name not in TAKE]
EXACT = ["ffa_lora", "rolora", "fedsvd", "flora", "fedex_lora"]
RANK = 5
START = random_adapter(100, RANK)
TIGHT = 1e-10


def rule(method: str, **options: object) -> LoraStrategy:
    return build(method, ranks="lora", **options)


def layout_of(strategy: LoraStrategy) -> Layout:
    return strategy.prepare(record_of(START))


def client(strategy: LoraStrategy, seed: int, own: int) -> Adapter:
    """A well-behaved client of this rank: random where it trains, the truncated start elsewhere."""
    train = strategy.plan(1).train
    ratio = scale_ratio("lora", RANK, own)
    drawn, pairs = random_adapter(seed, own), {}
    for name, ab in START.pairs.items():
        A = drawn.pairs[name].A if "A" in train else ab.A[:own]
        B = drawn.pairs[name].B if "B" in train else ab.B[:, :own] / ratio
        pairs[name] = LoraPair(A, B, ab.scale * ratio)
    return Adapter(pairs, drawn.vectors)


def clients(strategy: LoraStrategy, ranks: Sequence[int], first: int = 1) -> list[Adapter]:
    return [client(strategy, first + k, own) for k, own in enumerate(ranks)]


def played(
    strategy: LoraStrategy,
    adapters: Sequence[Adapter],
    counts: Sequence[float],
    order: Sequence[int] | None = None,
) -> Played:
    factors = "".join(strategy.plan(1).train)
    answers = [reply(record_of(a, factors), n) for a, n in zip(adapters, counts, strict=True)]
    done = play(strategy, START, answers, order=order)
    assert done.records[1].failures == () and done.records[1].merged
    return done


def read(arrays: ArrayRecord) -> Adapter:
    return Layout.of(record_of(START), SCALES).unpack(arrays)


def left(done: Played) -> Adapter:
    """What a run came to, with what it added to the base."""
    return widened(read(done.arrays), done.memory)


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_says_whether_and_why(method: str) -> None:
    assert METHODS[method].mixed_ranks.way in ("pad", "svd", "stack", "no")
    assert len(METHODS[method].mixed_ranks.because) > 20


@pytest.mark.parametrize("method", REFUSE)
def test_who_does_not_take_them_says_so(method: str) -> None:
    with pytest.raises(ConfigError, match=r"ranks: found 'lora', allowed: one rank with \w+: .+"):
        rule(method)


def test_a_rule_that_does_not_say_refuses() -> None:
    class Silent(METHODS["fedavg"]):  # type: ignore[misc]  # a class out of a table
        mixed_ranks = LoraStrategy.mixed_ranks

    with pytest.raises(ConfigError, match="Silent: it does not say how it takes several"):
        build(Silent, ranks="lora")


@pytest.mark.parametrize("method", TAKE)
@pytest.mark.parametrize("own", [1, 3, 5])
def test_one_client_gets_its_own_change_back(method: str, own: int) -> None:
    only = client(rule(method), 1, own)
    done = played(rule(method), [only], [7.0])
    assert difference(left(done), only) < TIGHT
    assert done.records[1].aggregation_error < TIGHT  # type: ignore[operator]


@pytest.mark.parametrize("method", TAKE)
def test_identical_clients_are_one_client(method: str) -> None:
    only = client(rule(method), 1, 3)
    done = played(rule(method), [only] * 3, [1.0, 5.0, 2.0])
    assert difference(left(done), only) < TIGHT


@pytest.mark.parametrize("method", TAKE)
def test_replies_in_any_order_give_the_same_bits(method: str) -> None:
    adapters, counts = clients(rule(method), [2, 5, 1, 3]), [3.0, 1.0, 4.0, 2.0]
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    found = [bits(played(rule(method), adapters, counts, order).arrays) for order in orders]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", [name for name in TAKE if METHODS[name].by_examples])
def test_a_client_split_in_two_counts_as_before(method: str) -> None:
    a, b = clients(rule(method), [2, 4])
    whole = played(rule(method), [a, b], [6.0, 4.0])
    split = played(rule(method), [a, a, b], [2.0, 4.0, 4.0])
    assert difference(left(split), left(whole)) < TIGHT


@pytest.mark.parametrize("method", [*EXACT, "flexlora"])
def test_products_are_averaged_with_each_clients_own_scale(method: str) -> None:
    """FlexLoRA too, where the ranks of all together fit."""
    rng = random.Random(3)
    for trial in range(10):
        ranks = [2, 1, 2] if method == "flexlora" else [rng.randint(1, 5) for _ in range(4)]
        adapters = clients(rule(method), ranks, first=10 * trial)
        counts = [rng.uniform(1, 9) for _ in ranks]
        done = played(rule(method), adapters, counts)
        found = left(done)
        for name in START.pairs:
            expected = dense_mean(adapters, normal(counts), name)
            assert relative(dense(found.pairs[name]), expected) < TIGHT
        assert done.records[1].aggregation_error < TIGHT  # type: ignore[operator]


def test_flexlora_is_the_svd_at_every_rank_that_a_client_takes() -> None:
    """Nested: the first units of the merged adapter are the best of their rank."""
    adapters, counts = clients(rule("flexlora"), [5, 4, 2]), [1.0, 2.0, 3.0]
    for split in ("right", "balanced"):
        found = read(played(rule("flexlora", split=split), adapters, counts).arrays)
        for name, ab in found.pairs.items():
            U, sigma, Vh = torch.linalg.svd(dense_mean(adapters, normal(counts), name))
            for own in (1, 2, 4, 5):
                held = cut(tensors(found), own, RANK / own)
                A, B = held[name.format("A")], held[name.format("B")]
                best = U[:, :own] @ torch.diag(sigma[:own]) @ Vh[:own]
                assert relative(ab.scale * RANK / own * (B @ A), best) < TIGHT


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(a.numpy().copy()) for n, a in record_of(adapter).items()}


def test_averaging_rules_count_what_a_client_lacks_as_zero() -> None:
    low, high = clients(rule("fedavg"), [2, 5])
    found = read(played(rule("fedavg"), [low, high], [1.0, 3.0]).arrays)
    for name, ab in found.pairs.items():
        A, B = torch.zeros_like(ab.A), torch.zeros_like(ab.B)
        A[:2], B[:, :2] = low.pairs[name].A, low.pairs[name].B * 5 / 2
        assert relative(ab.A, 0.25 * A + 0.75 * high.pairs[name].A) < TIGHT
        assert relative(ab.B, 0.25 * B + 0.75 * high.pairs[name].B) < TIGHT


@pytest.mark.parametrize("method", TAKE)
def test_units_that_nobody_had_can_still_be_trained(method: str) -> None:
    """Zeros in both factors of a unit would keep it dead for good; and the product is as it was."""
    strategy = rule(method)
    adapters = clients(strategy, [2, 1])
    done = played(strategy, adapters, [1.0, 2.0])
    plain = [
        unpacked(record_of(a), layout_of(rule(method)), strategy.plan(1).train, START)
        for a in adapters
    ]
    bare = merged(build(method), plain, [1.0, 2.0], START)
    assert difference(left(done), bare) < TIGHT
    for ab in read(done.arrays).pairs.values():
        assert bool((ab.A.any(dim=1) | ab.B.any(dim=0)).all())


def test_bytes_are_those_of_each_clients_rank() -> None:
    strategy, ranks = rule("fedavg"), [2, 5, 1]
    done = played(strategy, clients(strategy, ranks), [1.0, 1.0, 1.0])
    layout = layout_of(strategy)
    up = sum(field.bytes for own in ranks for field in narrowed(layout, own).fields)
    assert done.records[1].bytes_up == up
    assert done.records[1].bytes_down == 3 * sum(field.bytes for field in layout.fields)


def test_a_rank_that_is_none_costs_its_client_alone() -> None:
    strategy = rule("fedavg")
    good, odd = client(strategy, 1, 2), random_adapter(2, 6)
    answers = [reply(record_of(good), 1.0), reply(record_of(odd), 1.0)]
    done = play(strategy, START, answers)
    assert done.records[1].clients == (0,)
    assert "float64[6, 11], expected float64[5, 11]" in done.reasons[1]


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_workers_sum_what_the_server_would(method: str) -> None:
    strategy, ranks = rule(method), [2, 5, 3]
    train, layout = strategy.plan(1).train, layout_of(strategy)
    sums = strategy.summed()
    assert isinstance(sums, MeanSums | RidgeSums)
    parts = ("t", sums, layout.fields, layout.scales, train, 1, "n", Limits(), layout.ranks)
    order = SumsOrder(*parts)
    read_again = SumsOrder.read(order.text()).layout
    assert read_again == layout
    factors = "".join(train)
    padded = [
        unpacked(record_of(a, factors), read_again, train, START) for a in clients(strategy, ranks)
    ]
    updates, state = updates_of(padded, [1.0, 2.0, 4.0]), GlobalState(START)
    totals = dict(sums.first(updates))
    if told := sums.question(totals):
        totals |= sums.second(updates, told)
    found, expected = sums.merged(state, totals).adapter, strategy.merge(state, updates).adapter
    assert difference(found, expected) < TIGHT


@pytest.mark.parametrize("method", [name for name in TAKE if METHODS[name].linear])
def test_client_level_privacy_releases_the_padded_mean(method: str) -> None:
    """Hardly any noise and a wide clip: the mean of the clients, all counting the same."""
    privacy = ClientPrivacy(noise_multiplier=1e-9, clip=1e4, clients=3, sampling="none")
    strategy = rule(method, client_privacy=privacy)
    adapters = clients(strategy, [2, 5, 3])
    found = read(played(strategy, adapters, [1.0, 9.0, 4.0]).arrays)
    expected = read(played(rule(method), adapters, [1.0, 1.0, 1.0]).arrays)
    assert difference(found, expected) < 1e-4


def test_starts_and_uploads_stay_what_they_were() -> None:
    """Padding is the server's own copy: neither the start nor the uploads change."""
    strategy = rule("fedavg")
    adapters = clients(strategy, [2, 5])
    before = [tensors(a) for a in (START, *adapters)]
    played(strategy, adapters, [1.0, 2.0])
    for adapter, old in zip((START, *adapters), before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in tensors(adapter).items())
