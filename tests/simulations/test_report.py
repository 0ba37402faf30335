"""Reading runs back, and rows with numbers worked by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.errors import ConfigError
from simulations.report import Stat, grouped, rows
from simulations.run_folders import collect, read_run
from simulations.tables import as_json, comma_separated, markdown, print_table, write


def record(number: int, **values: Any) -> dict[str, Any]:
    """One round as ``rounds.jsonl`` holds it."""
    blank: dict[str, Any] = {
        "round": number,
        "loss": 0.7,
        "accuracy": 0.5,
        "perplexity": None,
        "groups": {},
    }
    costs = {"aggregation_error": None, "bytes_up": 0, "bytes_down": 0, "seconds": 1.0}
    return {**blank, **costs, "clients": [], "failures": [], **values}


def make_run(folder: Path, records: list[dict[str, Any]], config: str) -> Path:
    """Write a run folder by hand."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "summary.json").write_text("{}")
    return folder


def settings(method: str = "fedavg", seed: int = 0, rounds: int = 1, rate: float = 0.001) -> str:
    """A config with what rows read."""
    top = f'name = "x"\nmethod = "{method}"\nseed = {seed}\nrounds = {rounds}\n'
    return f"{top}[train]\nlearning_rate = {rate}\n"


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """FedAvg on two seeds and FFA-LoRA on one."""
    start = record(0, groups={"a": 0.5, "b": 0.3}, bytes_down=100, seconds=1.0)
    for seed, groups, error in [(0, {"a": 0.9, "b": 0.5}, 0.1), (1, {"a": 0.7, "b": 0.6}, 0.3)]:
        end = record(
            1, groups=groups, aggregation_error=error, bytes_up=50, bytes_down=100, seconds=2.0
        )
        make_run(tmp_path / f"fedavg-{seed}", [start, end], settings(seed=seed))
    end = record(1, groups={"a": 0.6, "b": 0.6}, aggregation_error=0.0, bytes_up=25, loss=0.25)
    make_run(tmp_path / "ffa_lora-0", [start, end], settings("ffa_lora", rate=0.003))
    return tmp_path


def about(stat: Stat | None, mean: float, deviation: float | None) -> bool:
    """Whether a statistic is this one, up to the rounding of a few float64 sums."""
    return stat is not None and (stat.mean, stat.deviation) == pytest.approx((mean, deviation))


def test_a_row_is_the_mean_and_spread_over_seeds(comparison: Path) -> None:
    fedavg, ffa = rows(collect([comparison]))
    assert (fedavg.method, fedavg.seeds, fedavg.learning_rate) == ("fedavg", (0, 1), 0.001)
    # group a: 0.9 and 0.7, mean 0.8, deviations 0.1 each, sqrt(0.02 / 1)
    assert about(fedavg.groups["a"], 0.8, 0.02**0.5)
    # means over groups: 0.7 and 0.65; worst groups: 0.5 and 0.6
    assert about(fedavg.mean, 0.675, 0.00125**0.5)
    assert about(fedavg.worst, 0.55, 0.005**0.5)
    assert about(fedavg.before, 0.4, 0.0)
    assert about(fedavg.aggregation_error, 0.2, 0.02**0.5)
    assert fedavg.bytes_up == Stat(50.0, 0.0)
    assert fedavg.bytes_down == Stat(200.0, 0.0)
    assert fedavg.seconds == Stat(3.0, 0.0)
    assert about(ffa.mean, 0.6, None)
    assert ffa.loss == Stat(0.25, None)


def test_the_written_tables_hold_the_numbers(comparison: Path, tmp_path: Path) -> None:
    paths = write(collect([comparison]), tmp_path / "out")
    assert [path.name for path in paths] == ["table.md", "table.csv", "curves.png"]
    text = paths[0].read_text()
    assert "| fedavg | 0.001 | 0, 1 | 0.800 ± 0.141 | 0.550 ± 0.071 | 0.675 ± 0.035 |" in text
    assert "| ffa_lora | 0.003 | 0 | 0.600 | 0.600 | 0.600 | 0.600 | 0.400 |" in text
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    lines = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert float(lines[0]["mean"]) == pytest.approx(0.675)
    assert float(lines[0]["bytes_up"]) == 50.0
    assert lines[1]["mean_sd"] == ""


def test_the_terminal_table_turns_when_it_is_too_wide(comparison: Path) -> None:
    found = rows(collect([comparison]))
    for width, first in [(60, "fedavg"), (250, "learning rate")]:
        console = Console(width=width, record=True, file=io.StringIO())
        print_table(found, console)
        heading = console.export_text().splitlines()[1]
        assert heading.split("┃")[2].strip() == first


def test_rows_become_strict_json(comparison: Path) -> None:
    line = (comparison / "ffa_lora-0" / "rounds.jsonl").read_text()
    (comparison / "ffa_lora-0" / "rounds.jsonl").write_text(
        line.replace('"aggregation_error": 0.0', '"aggregation_error": Infinity')
    )
    text = json.dumps(as_json(rows(collect([comparison]))), allow_nan=False)
    assert json.loads(text)[1]["aggregation_error"]["mean"] == "inf"


def test_language_runs_show_perplexity_and_no_accuracy(tmp_path: Path) -> None:
    by_group = {"groups": {"odes": 0.4, "lists": 0.6}, "perplexities": {"odes": 15.0, "lists": 8.0}}
    records = [record(0, perplexity=20.0, accuracy=None)]
    records += [record(1, perplexity=10.0, loss=2.3, **by_group)]
    make_run(tmp_path / "lm", records, settings())
    (row,) = rows(collect([tmp_path]))
    assert (row.mean, row.perplexity, row.before) == (None, Stat(10.0), Stat(20.0))
    assert row.groups == {"odes": Stat(15.0), "lists": Stat(8.0)}
    heading, _, line, *_ = markdown([row]).splitlines()
    assert "| odes | lists | perplexity |" in heading and "| 15.000 | 8.000 | 10.000 |" in line
    assert "mean" not in heading
    assert "perplexity:odes,perplexity:odes_sd" in comma_separated([row])
    write(collect([tmp_path]), tmp_path / "out")


def test_other_settings_make_another_row(tmp_path: Path) -> None:
    for rate in (0.001, 0.01):
        make_run(tmp_path / f"lr{rate}", [record(0), record(1)], settings(rate=rate))
    assert list(grouped(collect([tmp_path]))) == [
        "fedavg (train.learning_rate=0.001)",
        "fedavg (train.learning_rate=0.01)",
    ]


def test_a_key_that_an_older_version_lacked_had_its_default(tmp_path: Path) -> None:
    told = "[evaluate]\npersonal = false\n"
    for seed, more in enumerate((told, told + "every = 0\n", told + "every = 2\n")):
        make_run(tmp_path / f"{seed}", [record(0), record(1)], settings(seed=seed) + more)
    found = {name: len(runs) for name, runs in grouped(collect([tmp_path])).items()}
    assert found == {"fedavg (evaluate.every=0)": 2, "fedavg (evaluate.every=2)": 1}


def test_the_same_run_twice_is_no_second_sample(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, [record(0), record(1)], settings())
    with pytest.raises(ConfigError, match=r"one and .*two: the same settings and seed 0"):
        rows(collect([tmp_path]))


def test_unfinished_runs_and_failures_are_told(tmp_path: Path) -> None:
    failure = {"client": 2, "stage": "train", "reason": "no reply"}
    make_run(tmp_path / "a", [record(0), record(1, failures=[failure])], settings(rounds=3))
    (row,) = rows(collect([tmp_path]))
    assert row.notes == (
        "fedavg, seed 0: only 1 of 3 rounds were finished",
        "fedavg, seed 0: 1 failed replies, see its rounds.jsonl",
    )
    assert row.notes[0] in markdown([row])


def test_one_folder_given_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [record(0)], settings())
    assert len(collect([run, tmp_path])) == 1


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty: neither a run folder"):
        collect([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"round": 1,', r"rounds\.jsonl, line 2: not JSON"),
        ("[1]", r"rounds\.jsonl, line 2: found \[1\], allowed: a JSON object"),
        ("{}", r"rounds\.jsonl, line 2: no whole number under 'round'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    run = make_run(tmp_path / "a", [record(0)], settings())
    with (run / "rounds.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_run(run)


def test_an_empty_run_and_a_broken_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.jsonl: empty"):
        read_run(make_run(tmp_path / "a", [], settings()))
    with pytest.raises(ConfigError, match=r"config\.toml: .*line 1"):
        read_run(make_run(tmp_path / "b", [record(0)], "= 3"))


def test_numbers_on_clients_own_rows_are_columns_where_all_runs_have_them(tmp_path: Path) -> None:
    def own(mean: float) -> dict[str, Any]:
        over = {"mean": mean, "worst": mean / 2, "spread": 0.125}
        return {"global": {"clients": 3, "loss": {**over, "mean": 9.0}, "accuracy": over}}

    for seed, mean in ((0, 0.5), (1, 0.75)):
        records = [record(0, own_rows=own(0.1)), record(1, own_rows=own(mean))]
        make_run(tmp_path / f"{seed}", records, settings(seed=seed))
    make_run(tmp_path / "ffa", [record(0), record(1)], settings("ffa_lora"))
    found = rows(collect([tmp_path]))
    with_own = next(row for row in found if row.method == "fedavg")
    names = [f"own rows, global, {what}" for what in ("mean", "worst 10 %", "spread")]
    assert list(with_own.own_rows) == names
    assert about(with_own.own_rows[names[0]], 0.625, 0.03125**0.5)
    assert about(with_own.own_rows[names[1]], 0.3125, 0.0078125**0.5)
    assert with_own.own_rows[names[2]] == Stat(0.125, 0.0)
    lines = list(csv.DictReader(io.StringIO(comma_separated(found))))
    assert [line[names[0]] for line in lines] == ["0.625", ""]
    for number in (2, 3):  # a seed without them, and a language run
        blank = {"own_rows": own(0.5), "perplexity": 2.0} if number == 3 else {}
        make_run(tmp_path / f"{number}", [record(0), record(1, **blank)], settings(seed=number))
    (row,) = rows(collect([tmp_path / "0", tmp_path / "1", tmp_path / "2"]))
    assert row.own_rows == {}
    (row,) = rows(collect([tmp_path / "3"]))
    assert row.own_rows[names[0]] == Stat(9.0)
