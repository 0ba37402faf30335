"""RayGrid under faults: dead workers, late clients, an existing cluster, too little room."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError, FedloraError
from simulations.ray_grid import RayGrid

pytestmark = [
    pytest.mark.ray,
    # Ray leaves sockets and log files to the collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
APP = "tests.simulations.test_ray_grid:app"
app = ClientApp()


@app.train()
def act(message: Message, context: Context) -> Message:
    """Do as the message says: sleep, die, die once, raise, or say who answers."""
    ask = message.content["config"]
    client = int(context.node_config["partition-id"])
    seen = context.state.get("seen")
    count = int(seen["count"]) + 1 if isinstance(seen, MetricRecord) else 1
    context.state["seen"] = MetricRecord({"count": count})
    if ask.get(f"sleep-{client}"):
        time.sleep(600)
    if ask.get("nap"):
        time.sleep(0.4)
    if ask.get(f"die-{client}"):
        os._exit(1)
    marker = ask.get(f"die-once-{client}")
    if isinstance(marker, str) and not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    if ask.get(f"raise-{client}"):
        raise RuntimeError(f"client {client} gives up")
    metrics = MetricRecord({"client": client, "count": count, "pid": os.getpid()})
    content = RecordDict({"metrics": metrics})
    if "arrays" in message.content:
        content["arrays"] = message.content["arrays"]
        metrics["sum"] = float(message.content["arrays"]["x"].numpy().sum())
    return Message(content, reply_to=message)


@pytest.fixture(scope="module")
def grid() -> Iterator[RayGrid]:
    grid = RayGrid(APP, 5, LaunchConfig(backend="ray", workers=2))
    grid.ready()  # whoever has started first does all that is quick
    yield grid
    grid.close()


def ask(grid: RayGrid, timeout: float | None = None, **what: str | bool) -> list[Message]:
    config = ConfigRecord({key.replace("_", "-"): value for key, value in what.items()})
    messages = [
        Message(RecordDict({"config": config}), node, "train", group_id="1")
        for node in grid.get_node_ids()
    ]
    return list(grid.send_and_receive(messages, timeout=timeout))


def metric(reply: Message, name: str) -> int:
    return int(reply.content["metrics"][name])


def counts(grid: RayGrid) -> list[int]:
    """How often each client has answered, by the state that the grid keeps for it."""
    seen = [context.state.get("seen") for context in grid.contexts.values()]
    return [int(one["count"]) if isinstance(one, MetricRecord) else 0 for one in seen]


def test_replies_come_in_client_order_and_state_lasts(grid: RayGrid) -> None:
    first, second = ask(grid), ask(grid)
    assert [metric(reply, "client") for reply in first] == [0, 1, 2, 3, 4]
    assert [
        metric(b, "count") - metric(a, "count") for a, b in zip(first, second, strict=True)
    ] == ([1] * 5)
    assert len({metric(reply, "pid") for reply in [*first, *second]}) == 2


def test_an_exception_costs_its_own_client_and_is_named(grid: RayGrid) -> None:
    replies = ask(grid, raise_3=True)
    assert [reply.has_error() for reply in replies] == [False, False, False, True, False]
    assert replies[3].error.reason == "RuntimeError: client 3 gives up"


def test_a_worker_that_dies_once_costs_nothing(
    grid: RayGrid, tmp_path_factory: pytest.TempPathFactory
) -> None:
    marker, before = tmp_path_factory.mktemp("died") / "once", counts(grid)
    replies = ask(grid, die_once_1=str(marker))
    assert marker.exists() and not any(reply.has_error() for reply in replies)
    # what client 1 had in its state when its worker died is gone with it
    assert [now - then for then, now in zip(before, counts(grid), strict=True)] == [1] * 5


def test_a_client_that_kills_its_workers_is_given_up(grid: RayGrid) -> None:
    before = counts(grid)
    replies = ask(grid, die_2=True)
    assert counts(grid)[2] == before[2]
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False]
    assert "its worker died 3 times" in replies[2].error.reason
    assert not any(reply.has_error() for reply in ask(grid))  # the pool is whole again


def test_whoever_waits_behind_a_client_that_dies_is_not_to_blame(
    grid: RayGrid, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each of them kills one worker, which it may; a second death would be another's."""
    ask(grid), ask(grid)  # so that all are known to be quick, and jobs are queued
    markers = [tmp_path_factory.mktemp("died") / str(client) for client in range(5)]
    replies = ask(grid, **{f"die_once_{client}": str(path) for client, path in enumerate(markers)})
    assert all(path.exists() for path in markers)
    assert not any(reply.has_error() for reply in replies)


def test_a_client_that_never_ends_is_left_out(grid: RayGrid) -> None:
    grid.ready()  # whoever took the place of those that died is there
    started = time.monotonic()
    replies = ask(grid, timeout=8.0, sleep_0=True)
    assert time.monotonic() - started < 12
    late = [reply for reply in replies if reply.has_error()]
    assert replies[0] in late and len(late) <= 2  # and whoever was queued behind it
    assert all("no reply within 8 s" in reply.error.reason for reply in late)
    assert not any(reply.has_error() for reply in ask(grid))


def test_nothing_is_left_running_when_nobody_takes_the_replies(grid: RayGrid) -> None:
    grid.ready()
    config = ConfigRecord({"sleep-4": True})
    messages = [
        Message(RecordDict({"config": config}), node, "train", group_id="1")
        for node in grid.get_node_ids()
    ]
    replies = grid.deliver(messages, None)
    assert not next(replies).has_error()
    with pytest.raises(FedloraError, match="earlier stage"):
        ask(grid)
    replies.close()
    assert not any(reply.has_error() for reply in ask(grid))


def test_arrays_go_to_each_worker_once_and_to_its_successor_again(
    grid: RayGrid, tmp_path_factory: pytest.TempPathFactory
) -> None:
    marker = tmp_path_factory.mktemp("died") / "once"
    for value in (1.0, 2.0):
        arrays = ArrayRecord({"x": Array(numpy.full(50_000, value, numpy.float32))})
        config = ConfigRecord({"die-once-3": str(marker)})
        messages = [
            Message(RecordDict({"arrays": arrays, "config": config}), node, "train", group_id="1")
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages))
        assert [float(reply.content["metrics"]["sum"]) for reply in replies] == [value * 50_000] * 5
        assert all(message.content["arrays"] is arrays for message in messages)
        echoed = replies[2].content["arrays"]["x"]
        assert type(echoed.data) is bytes and echoed.data == arrays["x"].data
    assert marker.exists()


def test_more_workers_than_the_cluster_holds_are_refused(grid: RayGrid) -> None:
    with pytest.raises(ConfigError, match=r"launch\.workers: found 64 .*allowed"):
        RayGrid(APP, 5, LaunchConfig(backend="ray", workers=64))
    with pytest.raises(ConfigError, match="GPU"):
        RayGrid(APP, 5, LaunchConfig(backend="ray", workers=1, num_gpus=8.0))
    assert not any(reply.has_error() for reply in ask(grid))
