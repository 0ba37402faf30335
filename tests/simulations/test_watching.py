"""What is shown of runs while they go on, from their files."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from simulations import launch, watching
from simulations.chaos_runs import PRIVATE, config
from simulations.cli import main
from simulations.progress import Progress
from simulations.run_folders import read_run
from simulations.watching import look, shown


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run, one that is at round 2 of 4, and one that has written nothing."""
    folder = tmp_path_factory.mktemp("runs")
    launch.run(config("rounds=2", *PRIVATE), folder / "a", Progress())
    launch.run(config("rounds=4"), folder / "b", Progress())
    (folder / "b" / "summary.json").unlink()
    lines = (folder / "b" / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "b" / "rounds.jsonl").write_text("".join(lines[:3]))
    (folder / "c").mkdir()
    return folder


def text(folder: Path) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(shown(look(folder)))
    return console.export_text()


def test_how_far_each_run_is(runs: Path) -> None:
    one, other = look(runs)
    assert (one.name, one.rounds, one.planned, one.finished) == ("a", 2, 2, True)
    assert (other.name, other.rounds, other.planned, other.finished) == ("b", 2, 4, False)
    done = read_run(runs / "b").rounds
    assert other.loss == done[-1]["loss"] and other.spent is None
    assert other.left == pytest.approx(2 * (done[1]["seconds"] + done[2]["seconds"]) / 2)
    assert one.left is None


def test_what_was_measured_last_is_shown(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    last = read_run(tmp_path / "b").last
    unmeasured = {**last, "round": 3, "loss": None, "accuracy": None, "groups": {}}
    with (tmp_path / "b" / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(unmeasured) + "\n")
    seen = look(tmp_path)[0]
    assert (seen.rounds, seen.loss) == (3, last["loss"]) and seen.score is not None


def test_what_was_spent_is_what_the_statement_says(runs: Path) -> None:
    said = json.loads((runs / "a" / "privacy.json").read_text())
    assert look(runs)[0].spent == pytest.approx(said["accountants"]["rdp"])


def test_a_half_written_line_is_not_waited_for(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    with (tmp_path / "b" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    assert look(tmp_path) == [] and "nothing yet" in text(tmp_path)


def test_what_is_shown(runs: Path) -> None:
    found = text(runs)
    assert "2/2" in found and "2/4" in found and "finished" in found
    assert "1 of 2 runs finished; in one process" in found


def test_the_command_looks_once_where_nobody_watches(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(runs)]) == 0
    assert "1 of 2 runs finished" in capsys.readouterr().out
    assert main(["watch", str(runs / "a"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["name"] == "a" and told["finished"]
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "found no folder" in capsys.readouterr().err


def test_it_ends_with_the_last_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        shutil.copy(runs / "a" / "summary.json", tmp_path / "b")

    monkeypatch.setattr(watching.time, "sleep", sleep)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["watch", str(tmp_path)]) == 0
    assert len(slept) == 1
