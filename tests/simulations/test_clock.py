"""Runs on a virtual clock: recipes that ask for one, what they leave, and going on with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.serverapp import Grid

from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from simulations import launch
from simulations.chaos_runs import PRIVATE, QUICK, tree
from simulations.clock import check_runtime
from simulations.forecast import traffic
from simulations.progress import Progress
from simulations.recipe import load
from simulations.run_folders import collect
from simulations.server_app import serve, strategy_for
from simulations.tables import write
from strategies import METHODS
from tests.helpers import layout_of, random_adapter
from tests.simulations.resumed import die, run
from tests.simulations.test_agreement import bits

SLOW = ("clock.speeds=lognormal", "clock.dropout=0.2", "clock.availability=0.6", "clients.number=6")
ROUNDS = ("clock.mode=rounds", "clock.over_select=1.5", "clients.fraction_train=0.5", *SLOW)
BUFFER = ("clock.mode=fedbuff", "clock.buffer=2", *SLOW)

REFUSED = {
    "options without a clock": (["clock.deadline=3"], "clock: .*mode = .* with deadline"),
    "spare clients of a buffer": (
        ["clock.mode=fedbuff", "clock.buffer=2", "clock.over_select=1.3"],
        "clock: .*no over_select with mode = .fedbuff",
    ),
    "a buffer in rounds": (["clock.mode=rounds", "clock.buffer=2"], "clock: .*no buffer with mode"),
    "no buffer": (["clock.mode=fedbuff"], "clock: .*buffer of 1 or more"),
    "a buffer too small": (
        ["clock.mode=fedbuff", "clock.buffer=1"],
        r"clock.buffer: found 1, allowed: from 2 \(clients.min_train_nodes\) to 4",
    ),
    "a buffer too large": (["clock.mode=fedbuff", "clock.buffer=5"], "clock.buffer: found 5"),
    "whole clients": (
        ["clock.mode=rounds", "privacy.unit=client", "privacy.noise_multiplier=1.0"],
        "clock.mode: found 'rounds', allowed: 'none' with privacy.unit = 'client'",
    ),
    "sums": (
        ["clock.mode=fedbuff", "clock.buffer=2", "launch.sums=workers"],
        "clock.mode: found 'fedbuff', .* launch.sums = 'workers'",
    ),
    "ranks": (
        ["clock.mode=fedbuff", "clock.buffer=2", "adapter.ranks=[2, 4]"],
        "clock.mode: found 'fedbuff', .* several ranks",
    ),
    "chance": (["clock.mode=rounds", "clock.dropout=1.0"], "clock.dropout: found 1.0"),
}


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_a_clock_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load("tiny").resolve("fedavg", changes)


def test_a_rule_says_whether_it_can_have_a_buffer() -> None:
    taken = []
    for method in METHODS:
        try:
            load("tiny").resolve(method, ["clock.mode=fedbuff", "clock.buffer=2"])
        except ConfigError as error:
            assert str(error).startswith("clock.mode: found 'fedbuff', allowed: 'none' or 'rounds'")
        else:
            taken.append(method)
        load("tiny").resolve(method, ["clock.mode=rounds"])
    assert taken == ["fedavg", "ffa_lora", "la_lora", "fed_sb", "fedsa_lora"]


def test_flowers_own_runtime_has_no_virtual_clock() -> None:
    elsewhere = cast(Grid, object())
    with pytest.raises(ConfigError, match=r"clock.mode: found 'rounds'.*Flower's own runtime"):
        check_runtime(load("tiny").resolve(None, ["clock.mode=rounds"]), elsewhere)


@pytest.mark.parametrize("changes", [ROUNDS, BUFFER], ids=["rounds", "fedbuff"])
def test_a_run_that_dies_keeps_its_virtual_time(
    changes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*changes, "rounds=4", "options.server=momentum")
    run(tmp_path / "whole", *changes)
    for number, fault in enumerate(("merge@2", "after-commit@3")):
        folder = tmp_path / str(number)
        die(monkeypatch, fault, folder, *changes)
        run(folder, *changes, resume=True)
        assert tree(folder) == tree(tmp_path / "whole")
    records = rounds_of(tmp_path / "whole")
    times = [record["virtual_seconds"] for record in records]
    assert times[0] == 0.0 and times == sorted(times) and times[-1] > times[1]
    assert any(record["failures"] for record in records)
    assert (records[-1]["staleness_max"] is None) == (changes[0] == "clock.mode=rounds")


def test_a_private_run_with_a_buffer_charges_what_was_merged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, *PRIVATE, *BUFFER, "rounds=5", "clients.number=4")
    records = rounds_of(folder)
    merged = sorted(client for record in records for client in record["clients"])
    ledger = Ledger(folder / "ledger")
    charged = [client for client in range(4) for _ in ledger.charges(client)]
    assert charged == merged and len(merged) == 10


def test_tables_and_figures_tell_virtual_time(tmp_path: Path) -> None:
    run(tmp_path / "runs/one", *QUICK, *BUFFER)
    paths = {path.name: path for path in write(collect([tmp_path / "runs"]), tmp_path / "report")}
    assert "virtual seconds" in paths["table.md"].read_text()
    assert paths["virtual_time.png"].stat().st_size > 10_000
    assert (tmp_path / "runs/one/virtual_time.png").is_file()
    run(tmp_path / "plain/one", *QUICK)
    found = {path.name: path for path in write(collect([tmp_path / "plain"]), tmp_path / "report2")}
    assert "virtual_time.png" not in found
    assert "virtual seconds" not in found["table.md"].read_text()
    assert not (tmp_path / "plain/one/virtual_time.png").exists()


def test_a_dry_run_counts_whom_a_clock_asks() -> None:
    layout = layout_of(random_adapter(0))
    found = {}
    for changes in ((), ROUNDS, BUFFER):
        config = load("tiny").resolve("fedavg", ["clients.fraction_train=0.5", *SLOW[3:], *changes])
        sent = traffic(config, strategy_for(config, layout.scales), layout)
        found[changes[:1]] = (sent.clients, sent.down / sent.up, sent.exact)
    assert found[()] == (3, 1.0, True)
    assert found[ROUNDS[:1]] == (3, 5 / 3, False)  # 4.5 rounded up
    assert found[BUFFER[:1]] == (2, 1.0, False)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the collector
def test_workers_have_no_part_in_virtual_time(tmp_path: Path) -> None:
    found = {}
    for backend, workers in (("inprocess", 1), ("ray", 1), ("ray", 2)):
        where = (f"launch.backend={backend}", f"launch.workers={workers}", *QUICK, "rounds=4")
        configs = {
            name: load("tiny").resolve("fedavg", [*where, *changes])
            for name, changes in (("rounds", ROUNDS), ("fedbuff", BUFFER))
        }
        with launch.open_grid(configs["rounds"], Progress()) as grid:
            for name, config in configs.items():
                folder = tmp_path / f"{backend}{workers}{name}"
                grid.forget()
                serve(config, grid, folder)
                found[backend, workers, name] = bits(folder)
    for name in ("rounds", "fedbuff"):
        assert found["ray", 1, name] == found["inprocess", 1, name]
        assert found["ray", 2, name] == found["inprocess", 1, name]
