"""Bad replies: each one is refused by name, costs itself alone, and nothing is raised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedlora.lowrank import Adapter, LoraPair
from fedlora.rounds import HALVED
from strategies.replies import Reply, halved, mean_metrics
from tests.helpers import FACTOR_METHODS as METHODS
from tests.helpers import (
    RANK,
    SHARING,
    VECTORS,
    Answer,
    bits,
    build,
    difference,
    key,
    play,
    random_adapter,
    record_of,
    replies,
    reply,
    sent,
    trained,
    uploads,
)

torch.set_num_threads(1)

START = random_adapter(100)
HEAD = next(iter(VECTORS))


def spoiled(value: float) -> Callable[[ArrayRecord], RecordDict]:
    """A good reply with one number replaced."""

    def spoil(arrays: ArrayRecord) -> RecordDict:
        values = arrays[key("value", "B")].numpy()
        values[4, 1] = value
        return reply(ArrayRecord({**arrays, key("value", "B"): Array(values)}))

    return spoil


def instead(name: str, *shape: int) -> Callable[[ArrayRecord], RecordDict]:
    """A good reply with one array of another shape."""
    return lambda arrays: reply(ArrayRecord({**arrays, name: Array(numpy.zeros(shape))}))


def lying(shape: tuple[int, ...], data: bytes) -> Array:
    """An array whose bytes are not what it says."""
    return Array("float64", shape, "numpy.ndarray", data)


def counted(examples: Any) -> Callable[[ArrayRecord], RecordDict]:
    """A good reply with other ``num-examples``."""
    return lambda arrays: reply(arrays, examples)


def with_metrics(**records: MetricRecord) -> Callable[[ArrayRecord], RecordDict]:
    """A good reply with other metric records."""
    return lambda arrays: RecordDict({"arrays": arrays, **records})


BAD: Mapping[str, tuple[Callable[[ArrayRecord], Answer], str]] = {
    "NaN": (spoiled(float("nan")), "value.lora_B.weight' holds values that are not finite"),
    "inf": (spoiled(float("inf")), "value.lora_B.weight' holds values that are not finite"),
    "would broadcast": (instead(key("output", "B"), 1), "output.lora_B.weight' is float64[1]"),
    "head would broadcast": (instead(HEAD, 1), "classifier.weight' is float64[1], expected"),
    "transposed": (instead(key("output", "B"), RANK, 5), "float64[3, 5], expected float64[5, 3]"),
    "extra array": (instead("stranger", 2), "'stranger' is not part of this federation"),
    "0 examples": (counted(0), "'num-examples' is 0, expected a positive finite number"),
    "-1 examples": (counted(-1), "'num-examples' is -1, expected"),
    "NaN examples": (counted(float("nan")), "'num-examples' is nan, expected"),
    "inf examples": (counted(float("inf")), "'num-examples' is inf, expected"),
    "list of examples": (counted([3, 4]), "'num-examples' is [3, 4], expected"),
    "no examples": (with_metrics(metrics=MetricRecord({"loss": 1.0})), "'num-examples' is None"),
    "no metrics": (with_metrics(), "sent 0 metric records, expected 1"),
    "two metrics": (
        with_metrics(a=MetricRecord({"num-examples": 1}), b=MetricRecord({"num-examples": 1})),
        "sent 2 metric records, expected 1",
    ),
    "no arrays": (lambda _: RecordDict({"m": MetricRecord({"num-examples": 1})}), "sent 0 array"),
    "two array records": (
        lambda a: RecordDict({"a": a, "b": a, "m": MetricRecord({"num-examples": 1})}),
        "sent 2 array records, expected 1",
    ),
    "nothing at all": (lambda _: RecordDict(), "sent 0 metric records"),
    "an error": (
        lambda _: Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OutOfMemoryError: too big"),
        "OutOfMemoryError: too big",
    ),
    "an error without a reason": (lambda _: Error(ErrorCode.UNKNOWN), "error code 0"),
    "silence": (lambda _: None, "no reply"),
    "not an array": (
        lambda a: reply(ArrayRecord({**a, HEAD: lying((3, 7), b"PK\x03\x04 no archive")})),
        f"array {HEAD!r}",
    ),
    "absurd shape": (
        lambda a: reply(ArrayRecord({**a, HEAD: lying((10**30,), bytes(168))})),
        f"array {HEAD!r}",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", SHARING)
def test_a_bad_reply_costs_itself_alone(method: str, case: str) -> None:
    """Named with its reason; the round stands and equals the round of the others."""
    spoil, reason = BAD[case]
    strategy = build(method)
    adapters = uploads(strategy, START, 3)
    script = replies(strategy, adapters, [3.0, 4.0, 5.0])
    good = [script[0], script[2]]
    script[1] = spoil(script[1].array_records["arrays"])
    done = play(strategy, START, script)
    assert list(done.reasons) == [1]
    assert reason in done.reasons[1]
    assert [failure.stage for failure in done.records[1].failures] == ["train"]
    assert done.records[1].merged
    assert done.records[1].clients == (0, 2)
    assert bits(done.arrays) == bits(play(build(method), START, good).arrays)


@pytest.mark.parametrize("method", METHODS)
def test_missing_array_is_refused(method: str) -> None:
    strategy = build(method)
    script = replies(strategy, uploads(strategy, START, 2), [1.0, 1.0])
    arrays = script[1].array_records["arrays"]
    lost = next(key("query", factor) for factor in "BA" if key("query", factor) in arrays)
    del arrays[lost]
    done = play(strategy, START, script)
    assert f"{lost!r} is missing" in done.reasons[1]
    assert done.records[1].clients == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_good_replies_keep_the_old_state(method: str) -> None:
    strategy = build(method, min_train_nodes=3)
    script = replies(strategy, uploads(strategy, START, 4), [1.0, 2.0, 3.0, 4.0])
    script[1], script[3] = None, reply(record_of(START), -5)
    done = play(strategy, START, script)
    assert bits(done.arrays) == bits(record_of(START))
    assert (done.records[1].merged, done.records[1].clients) == (False, ())
    assert done.records[1].aggregation_error is None
    assert done.reasons[1] == "no reply"
    assert "'num-examples' is -5" in done.reasons[3]
    assert done.reasons[None].startswith("2 good replies, 3 needed (min_train_nodes)")
    assert "stays as it was" in done.reasons[None]


@pytest.mark.parametrize("method", METHODS)
def test_no_good_reply_at_all_keeps_the_old_state_and_the_run_goes_on(method: str) -> None:
    """Even where ``min_train_nodes`` is 0; the next round starts from the same arrays."""
    strategy = build(method, min_train_nodes=0)
    second = trained(strategy, START, 9, 2)

    def script(node: int, message: Message) -> Answer:
        return None if message.metadata.group_id == "1" else reply(sent(strategy, second, 2))

    done = play(strategy, START, script, clients=2, rounds=2)
    assert done.reasons[None].startswith("0 good replies, 1 needed")
    assert [record.merged for record in done.records] == [False, False, True]
    assert bits(done.grid.sent[2].content["arrays"]) == bits(done.grid.sent[0].content["arrays"])
    assert difference(done.whole(), second) < 1e-10  # some rules write the same change otherwise


@pytest.mark.parametrize("method", METHODS)
def test_one_client_cannot_vote_twice(method: str) -> None:
    """By replying twice, or by giving another client's number."""
    strategy = build(method)
    script = replies(strategy, uploads(strategy, START, 3), [1.0, 2.0, 3.0])
    alone = bits(play(build(method), START, script).arrays)
    twice = play(build(method), START, script, order=[0, 1, 2, 1])
    assert twice.reasons == {1: "replied twice"}
    assert bits(twice.arrays) == alone
    script[2]["reply"] = ConfigRecord({"client": 1})
    posing = play(build(method), START, script)
    assert posing.records[1].clients == (0, 1)
    assert posing.reasons == {2: "says it is client 1, and is client 2"}


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_to_another_round_is_refused(method: str) -> None:
    strategy = build(method)
    content = replies(strategy, uploads(strategy, START, 2), [1.0, 2.0])

    def script(node: int, message: Message) -> Answer:
        if node == 0:
            return content[0]
        earlier = Message(RecordDict(), node, "train", group_id="7")
        return Message(content[1], reply_to=earlier)

    done = play(strategy, START, script, clients=2)
    assert done.reasons == {1: "belongs to round 7, not 1"}
    assert done.records[1].clients == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_from_a_node_that_was_not_asked_is_refused(method: str) -> None:
    strategy = build(method)
    content = replies(strategy, uploads(strategy, START, 2), [1.0, 2.0])

    def script(node: int, message: Message) -> Answer:
        if node == 0:
            return content[0]
        elsewhere = Message(RecordDict(), 77, "train", group_id="1")
        return Message(content[1], reply_to=elsewhere)

    done = play(strategy, START, script, clients=2)
    assert done.reasons == {1: "no reply", 77: "was not asked"}
    assert done.records[1].clients == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_flower_says_is_gone_is_told_as_such(method: str) -> None:
    """Flower answers for it from the SuperLink's own number, which is no client's."""
    strategy = build(method)
    content = replies(strategy, uploads(strategy, START, 2), [1.0, 2.0])

    def script(node: int, message: Message) -> Answer:
        if node == 10:
            return content[0]
        elsewhere = Message(RecordDict(), SUPERLINK_NODE_ID, "train", group_id="1")
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=elsewhere)

    done = play(strategy, START, script, clients=2, first=10)
    assert done.reasons == {11: "no reply: Node Unavailable"}
    assert len(done.records[1].clients) == 1


@pytest.mark.parametrize("method", METHODS)
def test_who_poses_as_another_does_not_depend_on_arrival(method: str) -> None:
    """Of two replies for one client the lower node's counts, whichever came first."""
    strategy = build(method)
    script = replies(strategy, uploads(strategy, START, 2), [1.0, 2.0])
    for content in script:
        content["reply"] = ConfigRecord({"client": 5})
    seen = {
        tuple(bits(play(build(method), START, script, order=order).arrays).items())
        for order in ([0, 1], [1, 0])
    }
    assert len(seen) == 1


@pytest.mark.parametrize("method", METHODS)
def test_huge_but_finite_uploads_do_not_end_the_run(method: str) -> None:
    """A client that diverged without reaching infinity costs at most the round."""
    start = random_adapter(100, dtype=torch.float32)
    strategy = build(method, max_norm=math.inf)

    def script(node: int, message: Message) -> Answer:
        server_round = int(message.metadata.group_id)
        near = trained(strategy, start, node + 1, server_round)
        pairs = {
            n: LoraPair(ab.A, ab.B.clamp(-1, 1) * 3.3e38, ab.scale) for n, ab in near.pairs.items()
        }
        return reply(sent(strategy, Adapter(pairs, near.vectors), server_round))

    done = play(strategy, start, script, clients=2, rounds=2)
    for array in done.arrays.values():
        assert numpy.isfinite(array.numpy()).all()
    for record in done.records[1:]:
        assert record.merged or "not finite" in str(record.failures[-1].reason)


def test_a_metric_that_is_no_number_does_not_spoil_the_mean() -> None:
    found = [
        Reply(node, node, RecordDict(), examples, {"train_loss": loss})
        for node, examples, loss in ((0, 1.0, 4.0), (1, 100.0, float("nan")), (2, 3.0, 8.0))
    ]
    assert dict(mean_metrics(found)) == {"train_loss": 7.0}


def test_who_trained_in_halves_is_noted_if_it_is_a_number() -> None:
    said = [2.0, float("nan"), float("inf"), None, 1.0]
    found = [
        Reply(node, node, RecordDict(), 1.0, {} if size is None else {HALVED: size})
        for node, size in enumerate(said)
    ]
    assert halved(found) == {0: 2, 4: 1}
