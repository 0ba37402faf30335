"""``fedlora chaos`` at its small size: everything is survived, told and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations import chaos
from simulations.chaos_faults import Fault, Size
from simulations.cli import main

MIXED = ", ranks 2 and 4"


def test_uploads_and_payloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["chaos", "--quick", "--only", "uploads,fuzz", "--json", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [fault["name"] for fault in told["faults"]]
    uploads = [f"hostile uploads to {m}{r}" for m in ("fedavg", "rolora") for r in ("", MIXED)]
    assert names == [*uploads, "damaged payloads"]
    assert all(fault["held"] and fault["injected"] >= 25 for fault in told["faults"])
    assert sorted(path.name for path in out.iterdir()) == sorted(
        Path(path).name for path in told["written"]
    )
    assert "| damaged payloads | 2000 | 2000 |" in (out / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its files
def test_workers_stragglers_and_order(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["chaos", "--quick", "--only", "workers,order,stragglers,soak", "--json"])
    told = json.loads(capfd.readouterr().out)  # nothing else is there, though workers died
    assert code == 0, told
    counts = [(fault["injected"], fault["survived"]) for fault in told["faults"]]
    assert counts[:4] == [(3, 3), (1, 1), (8, 8), (1, 1)]
    *soaked, whole = told["faults"][4:]
    assert whole["name"] == "0.5 minutes without a pause" and soaked[-1]["injected"] > 1
    seen = [fault["seen"] for fault in told["faults"]]
    assert "18 of 18 results, 0 rounds lost, all 2 workers there afterwards" in seen[0]
    assert "its worker died 3 times" in seen[1] and "nothing left running" in seen[3]


def test_what_is_not_survived_is_told_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sinks(size: Size) -> list[Fault]:
        return [Fault("a storm", 3, 2, "one ship lost"), Fault("calm", 0, 0, "nothing")]

    monkeypatch.setattr(chaos, "CHAOS", {"sea": ("Does it float?", sinks)})
    assert main(["chaos"]) == 1
    shown = capsys.readouterr().out
    assert "2 (not all)" in shown and "0 (not all)" in shown
    assert main(["chaos", "--only", "see"]) == 2
    assert "did you mean 'sea'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chaos, "CHAOS", {"none": ("?", lambda size: [])})
    (tmp_path / "file").touch()
    assert main(["chaos", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err
