"""Sweeps: their cells, and that what is finished, fails or was killed costs the others nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from simulations import sweeping
from simulations.chaos_runs import tree
from simulations.cli import main
from simulations.progress import Lines, LiveBars, Progress, minutes
from simulations.sweep import Cell, read_sweep
from simulations.sweeping import run_sweep, shard
from tests.simulations.resumed import Died, Told

QUICK = """# Does it matter?
recipe = "tiny"
[set]
task.rows_per_group = 10
train.steps = 1
rounds = 1
"""
GRID = """[grid]
method = ["fedavg", "lora_fair"]
clients.fraction_train = [1.0, 0.5]
[grid.skew]
iid = { clients.split = "iid" }
hard = { clients.split = "pathological", clients.classes = 2 }
"""


def sweep(tmp_path: Path, grid: str, more: str = "") -> list[Cell]:
    path = tmp_path / "skew.toml"
    path.write_text(more + QUICK + grid)
    return read_sweep(path).cells()


def test_cells_are_all_entries_of_all_axes(tmp_path: Path) -> None:
    cells = sweep(tmp_path, GRID)
    assert [cell.name.rpartition("-")[0] for cell in cells] == [
        f"{method}-fraction_train{share}-{skew}"
        for method in ("fedavg", "lora_fair")
        for share in ("1.0", "0.5")
        for skew in ("iid", "hard")
    ]
    configs = [cell.config for cell in cells if cell.config is not None]
    assert {config.train.steps for config in configs} == {1}
    assert [config.method for config in configs] == ["fedavg"] * 4 + ["lora_fair"] * 4
    assert [config.clients.fraction_train for config in configs[:4]] == [1.0, 1.0, 0.5, 0.5]
    assert [config.clients.split for config in configs[:2]] == ["iid", "pathological"]
    assert read_sweep(tmp_path / "skew.toml").question == "Does it matter?"


def test_a_key_of_three_words_is_one_axis_and_an_axis_may_be_called_as_a_table(
    tmp_path: Path,
) -> None:
    axes = "[grid]\nadapter.options.alpha = [4, 8]\n[grid.privacy]\noff = { rounds = 2 }\n"
    configs = [cell.config for cell in sweep(tmp_path, axes)]
    assert [config.adapter.options["alpha"] for config in configs if config] == [4, 8]
    assert [config.rounds for config in configs if config] == [2, 2]


def test_a_cells_folder_follows_from_what_it_runs(tmp_path: Path) -> None:
    names = [cell.name for cell in sweep(tmp_path, GRID)]
    assert [cell.name for cell in sweep(tmp_path, GRID.replace("1.0, 0.5", "1.0"))] == [
        name for name in names if "1.0" in name
    ]
    others = {cell.name for cell in read_sweep(tmp_path / "skew.toml").cells(["seed=1"])}
    assert not others & set(names)


def test_a_cell_that_cannot_run_is_named_and_others_can(tmp_path: Path) -> None:
    cells = sweep(tmp_path, '[grid]\nmethod = ["median", "fedavg"]\nadapter.ranks = [[2, 4]]')
    assert [bool(cell.refused) for cell in cells] == [True, False]
    assert "one rank with median" in cells[0].refused


@pytest.mark.parametrize(
    ("grid", "more", "said"),
    [
        ("[grid]\nseed = [0, 0]", "", "each once"),
        ("[grid]\nseed = []", "", "grid.seed: found [], allowed: a list"),
        ("[grid]\nseed = 3", "", "grid.seed: found 3"),
        ("", "", "grid: found {}, allowed: one axis or more"),
        (
            "[grids]\nseed = [0]",
            "",
            "found 'grids', allowed: grid, recipe, set (did",
        ),
        ('[grid]\nmethod = ["fedavgg"]', "", "did you mean 'fedavg'?"),
        ('[grid]\n"train.lr" = [1]', "", "unknown key in train"),
        ("[grid.a]\nx = { seed = 1 }\ny = { seed = 1 }", "", "is the same run as"),
        ("[grid", "", "not valid TOML"),
    ],
)
def test_mistakes_are_one_line(
    grid: str, more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text(QUICK + grid)
    assert main(["sweep", str(tmp_path / "a.toml"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_a_shard_that_there_is_not(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shard: found .+, allowed: K/N with K from 1 to N"):
        shard(text, sweep(tmp_path, GRID))


def test_who_is_told_makes_no_other_cell(tmp_path: Path) -> None:
    cells, path = sweep(tmp_path, GRID), tmp_path / "skew.toml"
    told = read_sweep(path).cells(["launch.track=['mlflow']"])
    assert [cell.name for cell in told] == [cell.name for cell in cells]
    assert [cell.config for cell in told] != [cell.config for cell in cells]


def test_shards_share_the_cells(tmp_path: Path) -> None:
    cells = sweep(tmp_path, GRID)
    parts = [shard(f"{k}/3", cells) for k in (1, 2, 3)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(c.name for c in cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard("1/1", cells) == cells


def test_what_fails_is_named_and_tried_again_and_the_rest_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(QUICK + "[grid]\nseed = [0, 1, 2]\n")
    argv = ["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out"), "--json"]
    names = [cell.name for cell in read_sweep(tmp_path / "s.toml").cells()]
    real, broken = sweeping.serve_on, {1}

    def serve_on(grid: object, config: RunConfig, *rest: object) -> None:
        if config.seed in broken:
            raise RuntimeError("out\nof luck")
        real(grid, config, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeping, "serve_on", serve_on)
    assert main(argv) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["cells"] == {"all": 3, "run": [names[0], names[2]], "skipped": []}
    assert told["failed"] == {names[1]: "RuntimeError: out of luck"}
    assert "out of luck" in (tmp_path / "out" / "failed" / f"{names[1]}.txt").read_text()
    assert [row["seeds"] for row in told["rows"]] == [[0, 2]]
    broken.clear()
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cells"] == {"all": 3, "run": [names[1]], "skipped": [names[0], names[2]]}
    assert not list((tmp_path / "out" / "failed").iterdir())
    assert main([*argv, "--dry-run"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["state"] for cell in cells] == ["finished"] * 3


def test_a_sweep_that_was_killed_goes_on_in_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [cell for cell in sweep(tmp_path, "[grid]\nseed = [0, 1]") if cell.config is not None]
    run_sweep(cells, tmp_path / "whole", Progress())

    def strike() -> None:
        raise Died

    with monkeypatch.context() as armed:
        armed.setattr("fedlora.faults.armed", "after-commit@0")
        armed.setattr("fedlora.faults.strike", strike)
        with pytest.raises(Died):
            run_sweep(cells, tmp_path / "died", Progress())
    told = Told()
    ended = run_sweep(cells, tmp_path / "died", told)
    assert ended.finished == [cell.name for cell in cells] and not ended.failed
    assert any("goes on after round 0" in note for note in told.notes)
    assert tree(tmp_path / "died") == tree(tmp_path / "whole")


def test_cells_share_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = sweeping.open_grid

    @contextmanager
    def open_grid(config: RunConfig, progress: Progress) -> Iterator[object]:
        opened.append(config.clients.number)
        with real(config, progress) as grid:
            yield grid

    monkeypatch.setattr(sweeping, "open_grid", open_grid)
    grid = '[grid]\nclients.split = ["iid"]\nclients.number = [2, 3]\nseed = [0, 1]'
    cells = sweep(tmp_path, grid)
    assert len(cells) == 4
    ended = run_sweep(cells[::2] + cells[1::2], tmp_path / "out", Progress())
    assert len(ended.finished) == 4 and not ended.failed
    assert len(opened) == 2 and set(opened) == {2, 3}


def test_progress_of_a_sweep() -> None:
    out = io.StringIO()
    Lines(Console(file=out)).cells_done(3, 12, 3725.0)
    assert out.getvalue() == "sweep: 3 of 12 cells done, about 1:02:05 left\n"
    assert [minutes(s) for s in (-1, 0.4, 59.6, 3599, 3600)] == [
        "0:00",
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
    ]
    bars = LiveBars(Console(file=io.StringIO(), force_terminal=True))
    with bars:
        bars.cells_done(0, 2, None)
        bars.run_started("a", 3)
        assert len(bars.bars.tasks) == 3
        bars.run_failed()
        bars.cells_done(1, 2, 5.0)
        assert [(task.completed, task.total) for task in bars.bars.tasks] == [(1, 2)]
