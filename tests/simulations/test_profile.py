"""`fedlora run --profile`: nothing in a result changes, and the parts add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.stopwatch import PARTS
from simulations import launch
from simulations.cli import main
from simulations.progress import Progress
from simulations.recipe import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files to the collector
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus, of its own hooks
]
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-4")
PACKS = ("clients.number=8", "launch.pack=3")
CASES = {
    "plain": (),
    "frozen A": ("method=ffa_lora",),
    "dropout": ("method=lora_fair", "adapter.options.dropout=0.3"),
    "packs": PACKS,
    "private": PRIVATE,
    "private packs": (*PACKS, *PRIVATE, "method=ffa_lora"),
    "whole clients": ("privacy.unit=client", "privacy.noise_multiplier=1.0"),
    "no factors": ("adapter.name=miss",),
}


def run(folder: Path, *changes: str, profile: bool = True) -> Path:
    return launch.run(load("tiny").resolve(None, changes), folder, Progress(), profile)


def bits(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def check(folder: Path, workers: int) -> dict[str, float]:
    """The seconds of each part, which are those of all workers, none left out or negative."""
    profile = json.loads((folder / "profile.json").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    parts = {name: part["seconds"] for name, part in profile["parts"].items()}
    assert list(parts) == [part for part in PARTS if part in parts]
    assert min(parts.values()) >= 0 and profile["before_seconds"] > 0
    assert profile["workers"] == workers
    assert profile["wall_seconds"] >= sum(record["seconds"] for record in rounds)
    assert sum(parts.values()) == pytest.approx(profile["worker_seconds"], rel=1e-9)
    assert sum(parts.values()) == pytest.approx(workers * profile["wall_seconds"], rel=1e-6)
    assert sum(part["share"] for part in profile["parts"].values()) == pytest.approx(1.0)
    return parts


@pytest.mark.parametrize("case", CASES)
def test_a_profiled_run_is_the_same_run(tmp_path: Path, case: str) -> None:
    changes = CASES[case]
    folder = run(tmp_path / "profiled", *changes)
    assert bits(folder) == bits(run(tmp_path / "plain", *changes, profile=False))
    assert not (tmp_path / "plain" / "profile.json").exists()
    parts = check(folder, 1)
    everywhere = {"data", "base forward", "base backward", "adapter forward", "adapter backward"}
    everywhere |= {"optimiser", "evaluation", "transport", "checks", "merge", "other"}
    assert all(parts[part] > 0 for part in everywhere), parts
    assert ("privacy" in parts) == ("private" in case)  # the server's is in checks
    assert "waiting" not in parts


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("case", ["plain", "private packs"])
def test_workers_account_for_all_their_time(tmp_path: Path, case: str) -> None:
    where = ("launch.backend=ray", "launch.workers=2")
    folder = run(tmp_path / "ray", *CASES[case], *where)
    assert bits(folder) == bits(run(tmp_path / "here", *CASES[case], profile=False))
    parts = check(folder, 2)
    for part in ("start-up", "base forward", "adapter backward", "evaluation", "merge", "waiting"):
        assert parts[part] > 0, parts


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "tiny", "--rounds", "1", "--profile", "--out"]
    assert main([*argv, str(tmp_path / "table")]) == 0
    printed = capsys.readouterr().out
    assert "adapter backward" in printed and "100.0%" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "table")
    assert main([*argv, str(tmp_path / "json"), "--json"]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert profiles == {"json": json.loads((tmp_path / "json" / "profile.json").read_text())}


def test_each_run_of_a_comparison_has_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", "tiny", "--methods", "fedavg,ffa_lora", "--rounds", "1", "--profile"]
    assert main([*argv, "--json", "--out", str(tmp_path / "out")]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert list(profiles) == ["fedavg-seed0", "ffa_lora-seed0"]
    for name in profiles:
        check(tmp_path / "out" / name, 1)
