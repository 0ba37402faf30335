"""Strategies on a virtual clock: over-selection, deadlines, and merging a buffer."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter
from fedlora.wire import Layout
from strategies import ClientPrivacy
from strategies.sampling import with_spare
from tests.helpers import (
    FACTOR_METHODS,
    SCALES,
    bits,
    build,
    difference,
    play,
    random,
    random_adapter,
    record_of,
    reply,
)
from tests.strategies.test_world import world

AVERAGING = [name for name, rule in FACTOR_METHODS.items() if rule.averages]
BUFFERED = [name for name in AVERAGING if name != "rolora"]
HAND = {0: 2.0, 1: 3.0, 2: 5.0}


def upload(node: int, message: Message) -> ArrayRecord:
    """What was sent, moved by numbers of this client and round where it trains."""
    trains, number = str(message.content["config"]["train"]), int(message.metadata.group_id)
    arrays = {}
    for place, (name, array) in enumerate(message.content["arrays"].items()):
        if "lora_" not in name or any(f"lora_{factor}" in name for factor in trains):
            value = array.numpy()
            change = 0.1 * random(*value.shape, seed=10_000 * number + 100 * node + place)
            arrays[name] = Array((value + change.numpy()).astype(value.dtype))
    return ArrayRecord(arrays)


def answer(node: int, message: Message) -> RecordDict:
    return reply(upload(node, message), 3 + node, client=node)


def unpacked(arrays: ArrayRecord) -> Adapter:
    return Layout.of(arrays, SCALES).unpack(arrays)


@pytest.mark.parametrize("rule", BUFFERED)
@pytest.mark.parametrize("server", ["none", "adam"])
def test_equal_clients_that_fill_the_buffer_are_those_of_plain_rounds(
    rule: str, server: str
) -> None:
    start, same = random_adapter(0), world(dict.fromkeys(range(4), 7.0), mode="fedbuff", buffer=4)
    plain = play(build(rule, server=server), start, answer, 4, rounds=3)
    found = play(build(rule, server=server, world=same), start, answer, 4, rounds=3)
    assert bits(found.arrays) == bits(plain.arrays)
    assert [record.virtual_seconds for record in found.records] == [0.0, 7.0, 14.0, 21.0]
    for ours, theirs in zip(found.records[1:], plain.records[1:], strict=True):
        assert (ours.staleness_mean, ours.staleness_max) == (0.0, 0)
        assert ours.aggregation_error == theirs.aggregation_error
        assert (ours.bytes_up, ours.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
        assert (theirs.virtual_seconds, theirs.staleness_mean) == (None, None)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_stale_change_is_made_to_the_newest_adapter(power: float) -> None:
    """The buffers of ``test_events_as_worked_by_hand``; client 2 began one merge before."""
    three = world(HAND, mode="fedbuff", buffer=2, staleness_power=power)
    start, sent = random_adapter(0), dict[tuple[int, int], Adapter]()

    def told(node: int, message: Message) -> RecordDict:
        arrays = upload(node, message)
        sent[node, int(message.metadata.group_id)] = unpacked(arrays)
        return reply(arrays, 3 + node, client=node)

    found = play(build("fedavg", world=three), start, told, 3, rounds=2)
    assert set(sent) == {(0, 1), (1, 1), (0, 2), (2, 1)}
    first = combined([(3 / 7, sent[0, 1]), (4 / 7, sent[1, 1])])
    weight = 2.0**-power
    moved = combined([(1.0, first), (weight, sent[2, 1]), (-weight, start)])
    second = combined([(3 / 8, sent[0, 2]), (5 / 8, moved)])
    assert apart(unpacked(found.arrays), second) < 1e-12
    assert difference(unpacked(found.arrays), second) < 1e-12
    one, two = found.records[1:]
    assert (one.clients, one.staleness_mean, one.staleness_max) == ((0, 1), 0.0, 0)
    assert (two.clients, two.staleness_mean, two.staleness_max) == ((0, 2), 0.5, 1)
    assert (one.virtual_seconds, two.virtual_seconds) == (3.0, 5.0)
    assert one.bytes_down * 2 == two.bytes_down * 3  # three began, then two
    assert one.bytes_up == two.bytes_up


def combined(parts: list[tuple[float, Adapter]]) -> Adapter:
    """``sum_k weight_k adapter_k``, each factor by itself."""
    first = parts[0][1]
    pairs = {
        name: type(pair)(
            sum(w * a.pairs[name].A for w, a in parts),  # type: ignore[arg-type]
            sum(w * a.pairs[name].B for w, a in parts),  # type: ignore[arg-type]
            pair.scale,
        )
        for name, pair in first.pairs.items()
    }
    vectors = {key: sum(w * a.vectors[key] for w, a in parts) for key in first.vectors}
    return Adapter(pairs, vectors)  # type: ignore[arg-type]


def apart(one: Adapter, other: Adapter) -> float:
    """The largest difference of two factors."""
    return max(
        float((getattr(pair, f) - getattr(other.pairs[name], f)).abs().max())
        for name, pair in one.pairs.items()
        for f in "AB"
    )


def test_what_came_too_late_for_one_buffer_is_in_the_next() -> None:
    same = world(dict.fromkeys(range(4), 1.0), mode="fedbuff", buffer=2)
    found = play(build("fedavg", world=same), random_adapter(0), answer, 4, rounds=3)
    assert [record.virtual_seconds for record in found.records] == [0.0, 1.0, 1.0, 2.0]
    assert [record.clients for record in found.records[1:3]] == [(0, 1), (2, 3)]
    assert [record.staleness_mean for record in found.records[1:]] == [0.0, 1.0, 0.0]
    assert [message.metadata.group_id for message in found.grid.sent[:4]] == ["1"] * 4


def test_a_client_that_fails_costs_its_place_in_the_buffer() -> None:
    three = world(HAND, mode="fedbuff", buffer=2)

    def told(node: int, message: Message) -> RecordDict | None:
        return None if node == 1 else answer(node, message)

    record = play(build("fedavg", world=three), random_adapter(0), told, 3).records[1]
    assert (record.merged, record.clients, record.staleness_max) == (True, (0,), 0)
    assert [(failure.client, failure.reason) for failure in record.failures] == [(1, "no reply")]


def test_the_first_to_reply_are_taken_and_the_others_named() -> None:
    four = world({0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}, over_select=2.0)
    strategy = build("fedavg", fraction_train=0.5, world=four)
    found = play(strategy, random_adapter(0), answer, 4, rounds=2)
    first = found.records[1]
    assert (first.clients, first.virtual_seconds) == ((2, 3), 2.0)
    late = "late on the virtual clock: waited for 2 s"
    assert found.reasons == {0: late, 1: late}
    assert [m.metadata.dst_node_id for m in found.grid.sent] == [2, 3, 2, 3]
    assert first.bytes_down == 2 * first.bytes_up
    assert found.records[2].virtual_seconds == 4.0


def test_spare_clients_are_counted_exactly() -> None:
    assert [with_spare(100, f, 999) for f in (1.0, 1.1, 1.101, 1.3)] == [100, 110, 111, 130]
    assert with_spare(10, 1.3, 12) == 12


def test_of_equal_clients_the_first_numbers_are_the_first() -> None:
    same = world(dict.fromkeys(range(6), 1.0), over_select=1.3)
    strategy = build("fedavg", fraction_train=0.5, world=same)
    found = play(strategy, random_adapter(0), answer, 6)
    (late,) = found.reasons  # four of six are asked for three
    assert late is not None and late > max(found.records[1].clients)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_clock_on_which_nobody_is_late_changes_nothing(fraction: float) -> None:
    start, same = random_adapter(0), world(dict.fromkeys(range(6), 1.0))
    plain = play(build("fedavg", fraction_train=fraction), start, answer, 6, rounds=3)
    found = play(build("fedavg", fraction_train=fraction, world=same), start, answer, 6, rounds=3)
    assert bits(found.arrays) == bits(plain.arrays)
    assert [r.clients for r in found.records] == [r.clients for r in plain.records]


def test_a_deadline_ends_the_round() -> None:
    slow = world({0: 1.0, 1: 2.0, 2: 9.0}, deadline=2.5)
    found = play(build("fedavg", world=slow), random_adapter(0), answer, 3, rounds=2)
    assert [record.virtual_seconds for record in found.records] == [0.0, 2.5, 5.0]
    assert found.records[1].clients == (0, 1)
    assert found.reasons == {2: "late on the virtual clock: waited for 2.5 s"}


def test_a_round_whose_clients_are_all_lost_keeps_the_adapter_and_takes_its_time() -> None:
    slow, start = world({0: 5.0, 1: 5.0}, deadline=2.0), random_adapter(0)
    found = play(build("fedavg", world=slow), start, answer, 2)
    assert bits(found.arrays) == bits(record_of(start))
    assert (found.records[1].merged, found.records[1].virtual_seconds) == (False, 2.0)
    assert "0 good replies" in found.reasons[None]


def test_who_drops_out_or_goes_away_is_named() -> None:
    lossy = world(dict.fromkeys(range(8), 10.0), dropout=0.4, availability=0.5, day=40.0)
    found = play(build("fedavg", world=lossy), random_adapter(0), answer, 8, rounds=6)
    reasons = [failure.reason for record in found.records for failure in record.failures]
    assert any(reason.startswith("dropped out on the virtual clock after") for reason in reasons)
    assert any(reason.startswith("went away on the virtual clock after") for reason in reasons)
    times = [record.virtual_seconds for record in found.records]
    assert times == sorted(times, key=lambda time: time or 0.0)


@pytest.mark.parametrize("rule", [name for name in FACTOR_METHODS if name not in BUFFERED])
def test_rules_that_do_more_than_average_have_no_buffer(rule: str) -> None:
    three: dict[str, Any] = {"world": world(HAND, mode="fedbuff", buffer=2)}
    with pytest.raises(ConfigError, match=r"clock.mode: found 'fedbuff', allowed: 'none' or"):
        play(build(rule, **three), random_adapter(0), answer, 3)
    play(build(rule, world=world(HAND)), random_adapter(0), answer, 3)


def test_whole_clients_have_no_privacy_on_a_clock() -> None:
    privacy = ClientPrivacy(noise_multiplier=1.0, clip=1.0, clients=3, fraction=1.0)
    for clock in (world(HAND), world(HAND, mode="fedbuff", buffer=2)):
        with pytest.raises(ConfigError, match="no sample that an accountant can price"):
            play(build("fedavg", client_privacy=privacy, world=clock), random_adapter(0), answer, 3)
