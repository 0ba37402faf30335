"""On a cluster of several nodes: who works where, and nodes that come, go, or cannot be used."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from ray.cluster_utils import Cluster

from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError, FedloraError
from fedlora.fetch import VADER_FILE
from simulations import launch, ray_pool
from simulations.installed import installed
from simulations.progress import Progress
from simulations.ray_grid import RayGrid
from simulations.recipe import load
from tests.simulations.resumed import Told
from tests.simulations.test_agreement import bits

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
APP = "tests.simulations.test_ray_cluster:app"
LACKING = "FEDLORA_TEST_LACKING"
CLIENTS = 6
PATIENCE = 300.0  # seconds, on a machine that has much else to do

if os.environ.get(LACKING):
    raise ImportError("No module named 'flour'")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Says on which node it runs; slow enough that each worker gets a client."""
    time.sleep(0.4)
    node = ConfigRecord({"node": ray.get_runtime_context().get_node_id()})
    content = {"metrics": MetricRecord({"x": 1}), "place": node}
    return Message(RecordDict(content), reply_to=message)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with two cores; tests add nodes, and take them away."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def grid_on(cluster: Cluster, told: Progress | None = None, **keys: object) -> RayGrid:
    config = LaunchConfig.model_validate({"backend": "ray", "address": cluster.address, **keys})
    return RayGrid(APP, CLIENTS, config, progress=told)


def asked(grid: RayGrid) -> list[str]:
    """The nodes on which all clients ran."""
    messages = [Message(RecordDict(), node, "train", group_id="1") for node in range(CLIENTS)]
    replies = list(grid.send_and_receive(messages, timeout=120.0))
    assert [reply.metadata.src_node_id for reply in replies] == list(range(CLIENTS))
    assert not any(reply.has_error() for reply in replies), replies[0].error
    return [str(reply.content.config_records["place"]["node"]) for reply in replies]


def settled(cluster: Cluster) -> None:
    """Wait until everything is free; workers that were ended leave theirs a little later."""
    end = time.monotonic() + PATIENCE
    while cluster.global_state.available_resources().get("CPU") != sum(
        node["Resources"].get("CPU", 0.0)
        for node in cluster.global_state.node_table()
        if node["Alive"]
    ):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_nodes_that_come_are_used_and_nodes_that_go_cost_nothing(cluster: Cluster) -> None:
    """One comes and goes, each in the middle of a round; a third cannot be used, and is named."""
    told = Told()
    grid = grid_on(cluster, told)
    assert grid.workers() == 2  # as many as have room; there may be one for each client
    head = cluster.head_node.node_id
    assert set(asked(grid)) == {head}

    places: set[str] = set()
    stop = threading.Event()

    def go_on() -> None:
        while len(places) < 2 and not stop.is_set():
            places.update(asked(grid))

    rounds = threading.Thread(target=go_on)
    rounds.start()
    second = cluster.add_node(num_cpus=1)
    rounds.join(timeout=PATIENCE)
    stop.set()
    assert places == {head, second.node_id} and grid.workers() == 3

    lacking = cluster.add_node(num_cpus=1, env_vars={LACKING: "yes"})
    end = time.monotonic() + PATIENCE
    while not any("flour" in note for note in told.notes) and time.monotonic() < end:
        assert lacking.node_id not in asked(grid)
    (note,) = [note for note in told.notes if "flour" in note]
    assert note.startswith("node ") and "No module named 'flour'; it is left out" in note
    assert len(note.splitlines()) == 1

    away = threading.Timer(0.5, cluster.remove_node, (second,), {"allow_graceful": False})
    away.start()
    asked(grid)
    away.join()
    end = time.monotonic() + PATIENCE
    while grid.workers() > 2 and time.monotonic() < end:  # the head hears late of the loss
        assert set(asked(grid)) == {head}
    assert grid.workers() == 2
    cluster.remove_node(lacking)
    grid.close()
    assert not ray.is_initialized()


@pytest.mark.slow
def test_workers_are_spread_or_packed_and_the_cluster_is_left_running(cluster: Cluster) -> None:
    nodes = [cluster.add_node(num_cpus=2, resources={"site": 1}) for _ in range(2)]
    try:
        found = {}
        for name, keys in {
            "spread": {"workers": 2},
            "pack": {"workers": 2, "placement": "pack", "resources": {"site": 0.5}},
        }.items():
            settled(cluster)
            grid = grid_on(cluster, **keys)
            grid.ready()
            found[name] = set(asked(grid))
            grid.close()
        sites = {node.node_id for node in nodes}
        assert len(found["spread"]) == 2
        assert len(found["pack"]) == 1 and found["pack"] < sites
    finally:
        for node in nodes:
            cluster.remove_node(node)


def test_what_no_node_holds_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"found 1 workers of 1 site each, .* 0 site"):
        grid_on(cluster, resources={"site": 1})
    with pytest.raises(ConfigError, match=r"found 'ray://127\.0\.0\.1:1', allowed: HOST:PORT"):
        RayGrid(APP, 5, LaunchConfig(backend="ray", workers=1, address="ray://127.0.0.1:1"))


@pytest.mark.slow
def test_without_an_address_somebody_elses_cluster_is_left_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another Fedlora on the nodes is named."""
    monkeypatch.setattr(ray_pool, "installed", lambda: {**installed(), "fedlora": "another"})
    grid = RayGrid(APP, 5, LaunchConfig(backend="ray", workers=1))  # Ray wrote down the other's
    try:
        assert ray.get_runtime_context().gcs_address != cluster.address
        with pytest.raises(FedloraError) as error:
            grid.ready()
    finally:
        grid.close()
    theirs = installed()["fedlora"]
    assert str(error.value).startswith("no worker can run: node ")
    assert f"fedlora is {theirs}, another here; install the same" in str(error.value)


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(ConfigError, match=r"launch\.address: cannot join '127\.0\.0\.1:1'"):
        RayGrid(APP, 5, LaunchConfig(backend="ray", workers=1, address="127.0.0.1:1"))


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_process_also_where_one_is_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    settled(cluster)
    node = cluster.add_node(num_cpus=2)
    quick = ["task.rows_per_group=10", "train.steps=2"]
    ray_sets = [*quick, "launch.backend=ray", f"launch.address={cluster.address}"]
    here = launch.run(load("tiny").resolve(None, quick), tmp_path / "one", Progress())

    class Losing(Told):
        def round_done(self, record: object) -> None:
            if node in cluster.worker_nodes:
                threading.Timer(0.2, cluster.remove_node, (node, False)).start()

    for name, told in (("two", Told()), ("losing", Losing())):
        sets = [*ray_sets, "launch.workers=4"]
        there = launch.run(load("tiny").resolve(None, sets), tmp_path / name, told)
        assert bits(there) == bits(here)
    assert not cluster.worker_nodes


@pytest.mark.slow
def test_a_node_without_the_data_is_named_or_brought_it(cluster: Cluster, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    node = cluster.add_node(num_cpus=2, env_vars={"FEDLORA_DATA": str(empty)})
    try:
        sets = ["task.name=vader", "task.rows_per_group=10", "train.steps=2", "rounds=1"]
        sets += ["launch.backend=ray", f"launch.address={cluster.address}", "launch.workers=3"]
        found = []
        for ship in ("false", "true"):
            settled(cluster)
            told = Told()
            config = load("tiny").resolve(None, [*sets, f"launch.ship={ship}"])
            found.append(bits(launch.run(config, tmp_path / ship, told)))
            notes = [note for note in told.notes if "left out" in note]
            if ship == "false":
                (note,) = notes
                assert f"vader: not found at {empty}/" in note and "fedlora fetch vader" in note
                assert not empty.exists()
            else:
                assert not notes and [path.name for path in empty.iterdir()] == [VADER_FILE]
        assert found[0] == found[1]
    finally:
        cluster.remove_node(node)
