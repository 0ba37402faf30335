"""Laws that every aggregation rule keeps, run on every entry of ``METHODS``.

The rules run with their default options, and some with others of their own below. Uploads are
float64, so that a law's tolerance is that of the rule's arithmetic and not of the wire.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter, LoraPair
from fedlora.rounds import GlobalState
from strategies.base import LoraStrategy
from strategies.merging import layer_of
from tests.helpers import FACTOR_METHODS as METHODS
from tests.helpers import (
    MODULES,
    RANK,
    VECTORS,
    Answer,
    Played,
    Shapes,
    bits,
    build,
    dense,
    dense_mean,
    difference,
    key,
    layer,
    merged,
    normal,
    pair,
    play,
    random_adapter,
    record_of,
    replies,
    reply,
    sent,
    trained,
    updates_of,
    uploads,
)

torch.set_num_threads(1)

TIGHT = 1e-10
COUNTS = {1: [7.0], 2: [3.0, 5.0], 5: [1.0, 10.0, 4.0, 2.5, 7.0]}
HEAD = next(iter(VECTORS))

SGD: dict[str, Any] = {"solver": "cosine_sgd", "steps": 30}
PRODUCT: dict[str, Any] = {"space": "product"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "ffa_lora, A drawn by clients": ("ffa_lora", {"send_frozen": False}),
    "lora_fair, no ridge": ("lora_fair", {"ridge": 0.0}),
    "lora_fair, A corrected": ("lora_fair", {"corrects": "A"}),
    "lora_fair, flat cosine": ("lora_fair", SGD),
    "lora_fair, cosine of columns": ("lora_fair", {**SGD, "cosine": "columns"}),
    "flexlora, balanced": ("flexlora", {"split": "balanced"}),
    "fedex_lora, some of the residual": ("fedex_lora", {"residual_rank": 2}),
    "fedsvd, every other round": ("fedsvd", {"every": 2}),
    "fedrot, half way": ("fedrot", {"strength": 0.5}),
    "fedrot, then LoRA-FAIR": ("fedrot", {"then": "lora_fair"}),
    "lora_lego, either sign": ("lora_lego", {"flip": True}),
    "median of products": ("median", PRODUCT),
    "trimmed mean of products": ("trimmed_mean", PRODUCT),
    "krum of products": ("krum", PRODUCT),
    "multi-krum of products": ("multi_krum", PRODUCT),
    "norm bound of products": ("norm_bound", PRODUCT),
}


@pytest.fixture(params=VARIANTS)
def make(request: pytest.FixtureRequest) -> Callable[..., LoraStrategy]:
    """Builds one rule; every law that takes it runs on every rule."""
    method, options = VARIANTS[request.param]
    return lambda **more: build(method, **{**options, **more})


@pytest.fixture(params=[name for name, (rule, _) in VARIANTS.items() if METHODS[rule].by_examples])
def make_weighted(request: pytest.FixtureRequest) -> Callable[..., LoraStrategy]:
    """Builds one of the rules for which a client counts by its examples."""
    method, options = VARIANTS[request.param]
    return lambda **more: build(method, **{**options, **more})


@pytest.fixture(
    params=[name for name, (rule, _) in VARIANTS.items() if not METHODS[rule].by_examples]
)
def make_unweighted(request: pytest.FixtureRequest) -> Callable[..., LoraStrategy]:
    """Builds one of the rules for which all clients count the same."""
    method, options = VARIANTS[request.param]
    return lambda **more: build(method, **{**options, **more})


START = random_adapter(100)


def test_one_client_gets_its_own_change_back(make: Callable[..., LoraStrategy]) -> None:
    strategy = make()
    only = uploads(strategy, START, 1)
    assert difference(merged(strategy, only, [7.0], START), only[0]) < TIGHT


@pytest.mark.parametrize("count", [2, 5])
def test_identical_clients_are_one_client(make: Callable[..., LoraStrategy], count: int) -> None:
    strategy = make()
    only = uploads(strategy, START, 1)
    alone = merged(strategy, only, [1.0], START)
    together = merged(strategy, only * count, COUNTS[count], START)
    assert difference(together, alone) < TIGHT


@pytest.mark.parametrize("count", [2, 5])
def test_replies_in_any_order_give_the_same_bits(
    make: Callable[..., LoraStrategy], count: int
) -> None:
    adapters = uploads(make(), START, count)
    seen = set()
    orders = list(itertools.permutations(range(count)))[:: 1 if count < 4 else 17]
    for order in orders:
        strategy = make()
        script = replies(strategy, adapters, COUNTS[count])
        done = play(strategy, START, script, order=order)
        record = done.records[1]
        assert record.clients == tuple(range(count))
        seen.add((tuple(bits(done.arrays).items()), record.train_loss, record.aggregation_error))
    assert len(orders) > 1
    assert len(seen) == 1


def test_client_order_is_by_number_not_by_node(make: Callable[..., LoraStrategy]) -> None:
    """Node ids are Flower's and random; a client that says its number is placed by that."""
    strategy = make()
    adapters, numbers = uploads(strategy, START, 5), [3, 0, 4, 1, 2]
    own = [sent(strategy, adapter) for adapter in adapters]
    plain = play(make(), START, [reply(s, n) for s, n in zip(own, COUNTS[5], strict=True)])
    by_node: list[Answer] = [reply(own[c], COUNTS[5][c], client=c) for c in numbers]
    shuffled = play(make(), START, by_node, first=100)
    assert shuffled.records[1].clients == (0, 1, 2, 3, 4)
    assert bits(shuffled.arrays) == bits(plain.arrays)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_only_the_ratios_of_examples_matter(make: Callable[..., LoraStrategy], count: int) -> None:
    strategy = make()
    adapters, counts = uploads(strategy, START, count), COUNTS[count]
    plain = merged(strategy, adapters, counts, START)
    for factor in (1e-6, 3.0, 1e9):
        scaled = merged(strategy, adapters, [factor * n for n in counts], START)
        assert difference(scaled, plain) < TIGHT


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_client_in_two_halves_is_one_client(
    make_weighted: Callable[..., LoraStrategy], count: int
) -> None:
    strategy = make_weighted()
    adapters, counts = uploads(strategy, START, count), COUNTS[count]
    plain = merged(strategy, adapters, counts, START)
    half = counts[0] / 2
    split = merged(strategy, [adapters[0], *adapters], [half, half, *counts[1:]], START)
    assert difference(split, plain) < TIGHT


def test_a_vanishing_weight_has_vanishing_influence(
    make_weighted: Callable[..., LoraStrategy],
) -> None:
    strategy = make_weighted()
    adapters = uploads(strategy, START, 3)
    without = merged(strategy, adapters[:2], COUNTS[2], START)
    influence = [
        difference(merged(strategy, adapters, [*COUNTS[2], weight], START), without)
        for weight in (1e-3, 1e-6, 1e-9)
    ]
    # in proportion to the weight: a thousandth of it has a thousandth of the influence
    assert influence[0] < 0.02
    assert influence[1] == pytest.approx(influence[0] / 1e3, rel=0.05)
    assert influence[2] == pytest.approx(influence[1] / 1e3, rel=0.05)


def test_huge_counts_do_not_overflow(make: Callable[..., LoraStrategy]) -> None:
    strategy = make()
    adapters = uploads(strategy, START, 2)
    plain = merged(strategy, adapters, [1.0, 1.0], START)
    assert difference(merged(strategy, adapters, [1e308, 1e308], START), plain) < TIGHT


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_are_shares_of_examples(
    make_weighted: Callable[..., LoraStrategy], count: int
) -> None:
    """Heads and other vectors are averaged by examples, whatever happens to the factors."""
    strategy = make_weighted()
    adapters, weights = uploads(strategy, START, count), normal(COUNTS[count])
    found = merged(strategy, adapters, COUNTS[count], START)
    for name in VECTORS:
        stack = numpy.stack([adapter.vectors[name].numpy() for adapter in adapters])
        expected = numpy.tensordot(weights, stack, axes=1)
        numpy.testing.assert_allclose(found.vectors[name].numpy(), expected, rtol=TIGHT)


@pytest.mark.parametrize("count", [2, 5])
def test_no_claimed_number_of_examples_matters(
    make_unweighted: Callable[..., LoraStrategy], count: int
) -> None:
    """Of a rule that says so: not one bit depends on what clients claim."""
    strategy = make_unweighted()
    adapters = uploads(strategy, START, count)
    plain = merged(strategy, adapters, [1.0] * count, START)
    for claimed in (COUNTS[count], [1e9] + [1.0] * (count - 1)):
        found = merged(strategy, adapters, claimed, START)
        assert bits(record_of(found)) == bits(record_of(plain))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge_is_pure(make: Callable[..., LoraStrategy], count: int) -> None:
    strategy = make()
    adapters = uploads(strategy, START, count)
    updates, state = updates_of(adapters, COUNTS[count]), GlobalState(START, 6)
    before = [bits(record_of(adapter)) for adapter in [START, *adapters]]
    drawn = torch.random.get_rng_state()
    first, second = strategy.merge(state, updates), strategy.merge(state, updates)
    assert [bits(record_of(adapter)) for adapter in [START, *adapters]] == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert bits(record_of(first.adapter)) == bits(record_of(second.adapter))
    assert first.round == 7
    assert all(ab.scale == START.pairs[name].scale for name, ab in first.adapter.pairs.items())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_recorded_errors_are_the_dense_ones(make: Callable[..., LoraStrategy], count: int) -> None:
    strategy = make()
    adapters, weights = uploads(strategy, START, count), normal(COUNTS[count])
    done = play(strategy, START, replies(strategy, adapters, COUNTS[count]))
    error, ideal = dict[str, float](), dict[str, float]()
    for name, ab in done.whole().pairs.items():
        mean = dense_mean(adapters, weights, name)
        error[name] = float((mean - dense(ab)).square().sum())
        ideal[name] = float(mean.square().sum())
    found, by_layer = done.records[1].aggregation_error, done.records[1].aggregation_error_by_layer
    if strategy.plan(1).personal:  # the products are not known
        assert found is None and not by_layer
        return
    # exact rules and one client: rounding leaves about 1e-16 of either way
    total = (sum(error.values()) / sum(ideal.values())) ** 0.5
    assert found == pytest.approx(total, rel=TIGHT, abs=1e-14)
    assert by_layer == {
        layer_of(name): pytest.approx((error[name] / ideal[name]) ** 0.5, rel=TIGHT, abs=1e-14)
        for name in error
    }


WIDTHS = {torch.float16: 2, torch.float32: 4, torch.float64: 8}


def numbers(factors: Sequence[str], personal: Sequence[str]) -> int:
    """r d_in for A, r d_out for B, per layer; and the head; nothing that is personal."""
    factors = [factor for factor in factors if factor not in personal]
    of_pairs = sum(
        RANK * (("A" in factors) * d_in + ("B" in factors) * d_out)
        for d_out, d_in, _ in MODULES.values()
    )
    return of_pairs + (3 * 7 + 3) * ("heads" not in personal)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("count", [1, 5])
def test_bytes_are_those_of_the_factors_that_travel(
    make: Callable[..., LoraStrategy], count: int, dtype: torch.dtype
) -> None:
    strategy, start = make(), random_adapter(100, dtype=dtype)
    plan = strategy.plan(1)
    script = replies(strategy, [trained(strategy, start, s) for s in range(count)], COUNTS[count])
    done = play(strategy, start, script)
    up = WIDTHS[dtype] * count * numbers(plan.train, plan.personal)
    down = WIDTHS[dtype] * count * numbers(plan.send, plan.personal)
    assert (done.records[1].bytes_up, done.records[1].bytes_down) == (up, down)
    for message in done.grid.sent:
        assert set(message.content["arrays"]) == {
            *[key(module, factor) for module in MODULES for factor in plan.send],
            *(VECTORS if "heads" not in plan.personal else ()),
        }
    assert set(done.arrays) == set(record_of(start))
    assert all(done.arrays[name].dtype == str(dtype)[6:] for name in done.arrays)


def test_no_dense_matrix_is_formed(make: Callable[..., LoraStrategy]) -> None:
    """Nothing of the size of the layer's weight, whichever way round.

    But by a rule that says it is ``dense``, and then it is true.
    """
    d_out, d_in = 101, 211
    start, *drawn = (Adapter({layer("wide"): pair(k, d_out, d_in)}) for k in range(4))
    strategy = make(scales=None)
    train = strategy.plan(1).train
    adapters = [
        Adapter(
            {
                name: LoraPair(ab.A if "A" in train else start.pairs[name].A, ab.B)
                for name, ab in adapter.pairs.items()
            }
        )
        for adapter in drawn
    ]
    with Shapes() as shapes:
        strategy.merge(GlobalState(start), updates_of(adapters, COUNTS[5][:3]))
    assert {(RANK, d_in), (d_out, RANK)} & shapes.seen
    dense = getattr(strategy, "dense", False)
    assert bool({(d_out, d_in), (d_in, d_out)} & shapes.seen) == dense
    assert dense or all(math.prod(shape) < d_out * d_in for shape in shapes.seen)


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_of_scale_one_needs_no_scales(method: str) -> None:
    """Scales only weigh layers in the recorded error; a rule's factors do not depend on them."""
    adapters = uploads(build(method), START, 3)
    script = replies(build(method), adapters, [1.0, 2.0, 3.0])
    with_scales = play(build(method), START, script)
    without = play(build(method, scales=None), START, script)
    assert bits(with_scales.arrays) == bits(without.arrays)


@pytest.mark.parametrize("method", METHODS)
def test_lower_precision_wire_is_computed_in_higher(method: str) -> None:
    """Float16 in, float16 out: the result is the float64 result, rounded once or twice."""
    start = random_adapter(100, dtype=torch.float16)
    adapters = [trained(build(method), start, seed) for seed in (1, 2, 3)]
    done = play(build(method), start, [reply(sent(build(method), a), 5) for a in adapters])

    def wide(adapter: Adapter) -> Adapter:
        pairs = {
            n: LoraPair(ab.A.double(), ab.B.double(), ab.scale) for n, ab in adapter.pairs.items()
        }
        return Adapter(pairs, {n: v.double() for n, v in adapter.vectors.items()})

    expected = merged(build(method), [wide(a) for a in adapters], None, wide(start))
    assert (
        difference(done.whole(), expected) < 2e-3
    )  # half an ulp of float16 is 5e-4, on each factor


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_averaged_by_examples(method: str) -> None:
    strategy = build(method)
    script: list[Answer] = []
    for seed, (examples, loss) in enumerate([(10, 0.5), (30, 0.9)]):
        content = reply(sent(strategy, trained(strategy, START, seed)), examples)
        content["metrics"] = MetricRecord({"num-examples": examples, "train_loss": loss})
        script.append(content)
    done: Played = play(strategy, START, script)
    assert done.records[1].train_loss == pytest.approx(0.8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fraction_train", 1.5),
        ("fraction_train", -0.1),
        ("min_train_nodes", -1),
        ("min_available_nodes", 0),
        ("seed", "one"),
        ("settle", float("nan")),
        ("node_timeout", float("inf")),
    ],
)
def test_options_out_of_range_are_refused_when_built(
    method: str, option: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=option):
        build(method, **{option: value})


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_may_rest_from_training_or_from_evaluation(method: str) -> None:
    """``fraction_train`` 0 evaluates only; ``fraction_evaluate`` 0 asks nobody, so nobody fails."""
    measured = RecordDict({"metrics": MetricRecord({"num-examples": 4, "accuracy": 0.25})})
    resting = build(method, fraction_train=0.0, fraction_evaluate=1.0)
    done = play(resting, START, [measured, measured], rounds=2)
    assert [record.accuracy for record in done.records[1:]] == [0.25, 0.25]
    assert [record.failures for record in done.records] == [(), (), ()]
    assert bits(done.arrays) == bits(record_of(START))
    strategy = build(method)
    script = replies(strategy, uploads(strategy, START, 2), [1.0, 2.0])
    assert play(strategy, START, script).records[1].failures == ()
