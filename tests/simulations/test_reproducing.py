"""Committed results run again: the same numbers agree, others are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations import launch
from simulations.chaos_runs import config
from simulations.cli import main
from simulations.progress import Progress
from simulations.reproducing import Compared
from simulations.run_folders import KEPT, collect, keep


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of FedAvg and one of FFA-LoRA, kept as results are."""
    runs, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("result")
    for method, seed in (("fedavg", 0), ("fedavg", 1), ("ffa_lora", 0)):
        asked = config("rounds=1", f"method={method}", f"seed={seed}")
        launch.run(asked, runs / f"{method}{seed}", Progress())
    keep(collect([runs]), folder / KEPT)
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], bool]:
    found = json.loads(capsys.readouterr().out)["compared"]
    return {(one["row"], one["number"]): one["agrees"] for one in found}


def test_what_was_committed_is_found_again(
    committed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", str(committed), "--json", "--out", str(tmp_path / "again")]
    assert main(argv) == 0
    numbers = [(row, name) for row in ("fedavg", "ffa_lora") for name in ("mean", "loss")]
    assert told(capsys) == dict.fromkeys(numbers, True)
    assert main([*argv, "--only", "ffa"]) == 0  # from what is there already
    assert told(capsys) == {("ffa_lora", "mean"): True, ("ffa_lora", "loss"): True}


def test_another_number_is_told_with_exit_code_1(
    committed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (committed / KEPT).read_text().splitlines()]
    for line in lines:
        if line["config"]["method"] == "ffa_lora":
            line["rounds"][-1]["loss"] += 1e-4
    (tmp_path / KEPT).write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["reproduce", str(tmp_path), "--out", str(tmp_path / "again")]
    assert main([*argv, "--json"]) == 1
    assert [one for one, agrees in told(capsys).items() if not agrees] == [("ffa_lora", "loss")]
    assert main(argv) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "spread", "agrees"),
    [
        (0.75, None, True),
        (0.7500004, None, True),
        (0.751, None, False),
        (0.759, 0.01, True),
        (0.761, 0.01, False),
        (0.739, 0.01, False),
    ],
)
def test_the_stated_spread_decides(found: float, spread: float | None, agrees: bool) -> None:
    assert Compared("fedavg", "mean", 3, 0.75, found, spread).agrees is agrees


def test_a_row_that_there_is_not(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(committed), "--only", "fedavgg"]) == 2
    assert "did you mean 'fedavg'?" in capsys.readouterr().err
