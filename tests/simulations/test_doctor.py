"""The doctor finds this installation sound, and would notice if it were not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.errors import FedloraError
from simulations.cli import main
from simulations.doctor import LARGEST_ERROR, checks, gradient_error, house_check


def test_the_house_stands() -> None:
    house_check()


def test_a_package_from_elsewhere_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "clients"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(FedloraError, match=f"must lie in one folder, found: .*{tmp_path}"):
        house_check()


def test_per_example_gradients_of_a_peft_model_are_right() -> None:
    assert gradient_error() <= LARGEST_ERROR


def test_nothing_here_is_broken() -> None:
    found = {check.name: check for check in checks()}
    assert [check for check in found.values() if check.state == "fail"] == []
    assert {"packages", "python", "torch", "opacus", "ray works"} <= set(found)
    assert {"data: vader", "own rows"} <= set(found)


@pytest.mark.ray
def test_ray_starts() -> None:
    command = [sys.executable, "-m", "simulations.cli", "doctor", "--ray"]
    done = subprocess.run(command, capture_output=True, text=True)  # Ray leaves daemons behind
    assert done.returncode == 0, done.stdout
    assert "ok    ray works: a task ran in worker process" in done.stdout


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert {"name", "state", "detail"} == set(json.loads(capsys.readouterr().out)[0])
