"""In process and on Ray, with one worker or two: the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load

pytestmark = pytest.mark.ray


def bits(folder: Path) -> tuple[list[dict[str, object]], bytes]:
    """Everything a run says but its times."""
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the collector
def test_in_process_and_ray_agree_bit_for_bit(tmp_path: Path) -> None:
    methods = ["fedavg", "ffa_lora", "lora_fair", "flexlora", "rolora", "lora_lego"]
    methods += ["flora", "fedex_lora", "fedsa_lora"]
    here = compared(tmp_path, methods, "inprocess", 1)
    assert compared(tmp_path, methods, "ray", 2) == here
    assert compared(tmp_path, methods[:3], "ray", 1) == here[:3]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus on its generator and hooks
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_private_training_agrees_bit_for_bit_too(tmp_path: Path) -> None:
    private = ["privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3"]
    here = compared(tmp_path, ["lora_fair"], "inprocess", 1, *private)
    assert compared(tmp_path, ["lora_fair"], "ray", 2, *private) == here


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_client_level_privacy_agrees_bit_for_bit_too(tmp_path: Path) -> None:
    private = ["privacy.unit=client", "privacy.noise_multiplier=1.0", "clients.fraction_train=0.7"]
    here = compared(tmp_path, ["fedavg", "ffa_lora"], "inprocess", 1, *private)
    assert compared(tmp_path, ["fedavg", "ffa_lora"], "ray", 2, *private) == here


def compared(
    tmp_path: Path, methods: list[str], backend: str, workers: int, *overrides: str
) -> list[tuple[list[dict[str, object]], bytes]]:
    """The bits of each method's run of the tiny recipe."""
    folder = launch.compare(
        load("tiny"),
        methods,
        [0],
        [f"launch.backend={backend}", f"launch.workers={workers}", *overrides],
        tmp_path / f"{backend}{workers}",
        Progress(),
    )
    return [bits(folder / f"{method}-seed0") for method in methods]
