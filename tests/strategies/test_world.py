"""Clients in virtual time: how long they take, when they are there, who is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlora.config_clock import ClockConfig
from fedlora.errors import FedloraError
from strategies.events import Flight, fill
from strategies.world import FATES, Task, World

BARE = {"seconds_per_megabyte_down": 0.0, "seconds_per_megabyte_up": 0.0}


def world(work: dict[int, float], seed: int = 0, **options: Any) -> World:
    """Seconds are those of the work, unless the options say otherwise."""
    given = {"mode": "rounds", "seconds_per_example": 1.0, **BARE, **options}
    return World(ClockConfig(**given), seed, work)


def test_a_task_takes_its_work_and_its_bytes() -> None:
    sends = world({3: 40.0}, seconds_per_example=0.5, seconds_per_megabyte_down=2.0)
    assert sends.seconds(3, 4e6, 1e6) == 40 * 0.5 + 4 * 2.0
    both = world({3: 40.0}, seconds_per_megabyte_up=3.0)
    assert both.task(3, 10.0, 4e6, 2e6, 0) == Task(3, 10.0, 10.0 + 40 + 6, "replies")
    with pytest.raises(FedloraError, match="found no work of node 4"):
        both.seconds(4, 0, 0)


def test_speeds_are_drawn_as_they_say() -> None:
    clients = dict.fromkeys(range(2000), 1.0)
    even = world(clients, speeds="uniform", spread=3.0)
    factors = [even.factor(client) for client in clients]
    assert min(factors) >= 1.0 and max(factors) < 4.0
    assert sum(factors) / 2000 == pytest.approx(2.5, abs=5 * 3 / 12**0.5 / 2000**0.5)
    skewed = world(clients, speeds="lognormal", spread=0.7)
    logs = [math.log(skewed.factor(client)) for client in clients]
    assert sum(logs) / 2000 == pytest.approx(0, abs=5 * 0.7 / 2000**0.5)
    assert sum(log * log for log in logs) / 2000 == pytest.approx(0.49, rel=0.16)
    assert {world(clients).factor(client) for client in clients} == {1.0}
    again = world(clients, seed=1, speeds="uniform", spread=3.0)
    assert (
        again.factor(7) != even.factor(7) == world(clients, speeds="uniform", spread=3.0).factor(7)
    )


def test_a_client_is_there_for_its_share_of_every_day() -> None:
    some = world({}, availability=0.25, day=100.0)
    for client in range(20):
        times = [0.5 * step for step in range(1000)]
        there = [bool(some.there([client], time)) for time in times]
        assert sum(there) == pytest.approx(250, abs=5)
        for time, here in zip(times, there, strict=True):
            start, end = some.window(client, time)
            assert here == (start <= time) and time < end and end - start == pytest.approx(25.0)
            assert some.there([client], start) == [client]
            assert some.there([client], end) == []
    assert len({some.window(client, 0.0) for client in range(20)}) == 20


def test_whoever_is_at_work_when_its_window_ends_is_lost() -> None:
    some = world({0: 30.0}, availability=0.25, day=100.0)
    start, end = some.window(0, 1000.0)
    assert some.task(0, start, 0, 0, 0) == Task(0, start, end, "went away")
    short = world({0: 20.0}, availability=0.25, day=100.0)
    assert short.task(0, start, 0, 0, 0).fate == "replies"


def test_the_first_thing_that_happens_to_a_task_counts() -> None:
    for number in range(200):
        task = world({0: 10.0}, dropout=0.5, deadline=4.0).task(0, 1.0, 0, 0, number)
        assert task.fate in ("dropped out", "late")
        assert (task.ends == 5.0) == (task.fate == "late")
    assert world({0: 4.0}, deadline=4.0).task(0, 1.0, 0, 0, 0).fate == "replies"


def test_so_many_are_lost_as_the_chance_says() -> None:
    lossy = world({0: 10.0}, dropout=0.3)
    tasks = [lossy.task(0, 0.0, 0, 0, number) for number in range(4000)]
    lost = [task.ends for task in tasks if task.fate == "dropped out"]
    assert len(lost) == pytest.approx(1200, abs=5 * (4000 * 0.3 * 0.7) ** 0.5)
    assert sum(lost) / len(lost) == pytest.approx(5.0, abs=5 * 10 / 12**0.5 / 1000**0.5)


def test_time_goes_by_until_enough_are_there() -> None:
    some = world({}, availability=0.3, day=100.0)
    moment, found = some.gathered(range(6), 7.0, 3)
    assert len(found) >= 3 and found == some.there(range(6), moment)
    earlier = [7.0 + step * (moment - 7.0) / 50 for step in range(50)] if moment > 7.0 else []
    assert all(len(some.there(range(6), time)) < 3 for time in earlier)
    with pytest.raises(FedloraError, match=r"clock.availability: found 0.01.*never 6 of 6"):
        world({}, availability=0.01).gathered(range(6), 0.0, 6)


def test_events_as_worked_by_hand() -> None:
    """Three clients that take 2, 3 and 5 seconds, all at work at once, two to a buffer."""
    three = world({0: 2.0, 1: 3.0, 2: 5.0}, mode="fedbuff", buffer=2)
    expected = [
        (3.0, [(0, 0, 0, 2), (1, 0, 0, 3)], 3),
        (5.0, [(0, 1, 3, 5), (2, 0, 0, 5)], 2),
        (7.0, [(1, 1, 3, 6), (0, 2, 5, 7)], 2),
        (9.0, [(1, 3, 7, 10), (2, 2, 5, 10)], 2),
    ]
    expected[3] = (10.0, [(0, 3, 7, 9), (1, 3, 7, 10)], 2)
    flight = Flight()
    for version, (now, batch, begun) in enumerate(expected):
        found = fill(three, flight, [0, 1, 2], version, 3, 0, 0)
        got = [(task.client, task.version, task.began, task.ends) for task in found.batch]
        assert (found.flight.now, got, found.begun, found.lost) == (now, batch, begun, ())
        assert Flight.of(found.flight.tensors()) == found.flight
        flight = found.flight
    assert [task.client for task in flight.waiting] == [2]  # it came at 10 s too: the next buffer's
    assert {task.fate for task in flight.flying} <= set(FATES)


def test_a_buffer_that_is_full_at_once_does_not_let_time_go_by() -> None:
    same = world(dict.fromkeys(range(4), 1.0), mode="fedbuff", buffer=2)
    first = fill(same, Flight(), range(4), 0, 4, 0, 0)
    second = fill(same, first.flight, range(4), 1, 4, 0, 0)
    assert [task.client for task in first.batch] == [0, 1]
    assert [task.client for task in second.batch] == [2, 3]
    assert (first.flight.now, second.flight.now, second.begun) == (1.0, 1.0, 0)


def test_places_are_kept_and_nobody_is_in_a_buffer_twice() -> None:
    work = {client: 1.0 + client for client in range(9)}
    busy = world(work, mode="fedbuff", buffer=4, dropout=0.2, availability=0.7, day=50.0)
    flight, ages = Flight(), set()
    for version in range(40):
        found = fill(busy, flight, range(9), version, 5, 0, 0)
        assert found.flight.now >= flight.now and len(found.flight.flying) <= 5
        clients = [task.client for task in found.batch]
        assert len(set(clients)) == len(clients) == 4
        assert all(task.fate == "replies" for task in found.batch)
        assert all(task.fate != "replies" for task in found.lost)
        ages |= {version - task.version for task in found.batch}
        flight = found.flight
    assert min(ages) == 0 and max(ages) > 1


def test_a_buffer_that_never_fills_is_given_up() -> None:
    slow = world({0: 60.0, 1: 60.0}, mode="fedbuff", buffer=2, availability=0.5, day=100.0)
    with pytest.raises(FedloraError, match="0 updates of 2 came"):
        fill(slow, Flight(), [0, 1], 0, 2, 0, 0)
