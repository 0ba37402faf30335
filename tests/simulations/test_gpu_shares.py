"""Workers on shares of a GPU, which Ray is told it has: how they are placed, not what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.resident import device_for
from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError
from simulations.ray_grid import RayGrid

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files to the collector
]
APP = "tests.simulations.test_gpu_shares:app"

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Says where it runs; slow enough that each worker gets a client."""
    time.sleep(0.5)
    place = {
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
        "process": os.getpid(),
        "device": device_for("auto").type,
    }
    content = {"metrics": MetricRecord({"x": 1}), "place": ConfigRecord(place)}
    return Message(RecordDict(content), reply_to=message)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray of 8 cores and one GPU, neither of which has to be there."""
    ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def places(launch: LaunchConfig) -> list[ConfigRecord]:
    grid = RayGrid(APP, 4, launch)
    try:
        grid.ready()
        messages = [Message(RecordDict(), node, "train", group_id="1") for node in range(4)]
        replies = list(grid.send_and_receive(messages))
        assert not any(reply.has_error() for reply in replies)
        return [reply.content.config_records["place"] for reply in replies]
    finally:
        grid.close()


def settled(gpus: float) -> bool:
    """Whether so many GPUs are free; workers that were killed leave theirs a little later."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if ray.available_resources().get("GPU", 0.0) >= gpus:
            return True
        time.sleep(0.1)
    return False


def test_four_quarters_fit_and_each_sees_the_gpu() -> None:
    assert settled(1)
    found = places(LaunchConfig(backend="ray", workers=4, num_gpus=0.25))
    assert [place["visible"] for place in found] == ["0"] * 4
    assert len({place["process"] for place in found}) == 4
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert [place["device"] for place in found] == [wanted] * 4


def test_five_quarters_are_refused() -> None:
    assert settled(1)
    with pytest.raises(ConfigError) as error:
        RayGrid(APP, 4, LaunchConfig(backend="ray", workers=5, num_gpus=0.25))
    assert str(error.value) == (
        "launch.workers: found 5 workers of 0.25 GPU each, allowed: what the cluster has, 1 GPU"
    )


@pytest.mark.slow
def test_as_many_workers_as_gpus_hold() -> None:
    assert settled(1)
    found = places(LaunchConfig(backend="ray", num_gpus=0.5, num_cpus=0.1))
    assert len({place["process"] for place in found}) == 2
