"""The page of a report: what it holds, that nothing in it escapes, and that it needs nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from simulations.cli import main
from simulations.report import rows
from simulations.report_page import dealt
from simulations.report_page.charts import BY_LAYER, short_names
from simulations.report_page.comparison import compared
from simulations.report_page.page import page
from simulations.run_folders import collect
from simulations.tables import as_json
from tests.simulations.page_runs import EVIL, Reader, write_run, write_runs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def text(runs: Path) -> str:
    return page(collect([runs]))


def data_of(text: str) -> Any:
    """The JSON in a page."""
    ((_, data),) = Reader(text).all("script", type="application/json", id="data")
    return json.loads(data)


def chart(text: str, name: str) -> Any:
    """One of its charts, or nothing."""
    return next((one for one in data_of(text)["charts"] if one["id"] == name), None)


def test_the_command_writes_the_page_beside_the_tables(
    runs: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs), "--html", "--out", str(tmp_path / "out"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    names = ["table.md", "table.csv", "curves.png", "report.html", "curves.svg", "runs.jsonl"]
    assert [Path(path).name for path in written] == names
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == text
    assert (tmp_path / "out" / "curves.svg").read_text().lstrip().startswith("<?xml")
    again = page(collect([tmp_path / "out"]))  # of the kept runs: nothing of it is lost
    assert again == text


def test_several_folders_need_a_place_for_the_page(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / "fedavg-0"), str(runs / "fedavg-1"), "--html"]) == 2
    assert "--html: found several folders, allowed: one, or --out" in capsys.readouterr().err


def test_the_table_is_there_without_a_script(text: str) -> None:
    reader = Reader(text)
    heads = [
        text for attributes, text in reader.all("th", scope="col") if "aria-sort" in attributes
    ]
    first = ["method", "mean", "worst", "loss", "calm", EVIL, "mean at round 0"]
    assert heads[: len(first)] == first
    assert heads[-2:] == ["learning rate", "seeds"]
    lines = reader.all("tr", data_rule="lora_fair")
    assert len(lines) == 1
    # 0.81, 0.805, 0.80: mean 0.805, deviation 0.005
    assert "lora_fair0.805 best ± 0.0050.705 best ± 0.005" in lines[0][1]
    assert [found["data-row"] for found, _ in reader.all("tr") if "data-row" in found] == list(
        "012"
    )


def test_the_best_is_marked_where_tests_support_it(text: str, tmp_path: Path) -> None:
    cells = Reader(text).all("td", class_="number best")
    assert len(cells) == 5  # mean, worst, loss and two groups, all of LoRA-FAIR
    title = cells[0][0]["title"] or ""
    assert "seed 0: 0.810; seed 1: 0.805; seed 2: 0.800" in title
    assert re.search(r"against fedavg: p = 0\.0\d+ over 3 seeds; against ffa_lora: p = ", title)
    assert "Here that holds for 5 of 5 scores." in text
    for seeds in (1, 2):
        few = page(collect([write_runs(tmp_path / str(seeds), seeds)]))
        assert not Reader(few).all("td", class_="number best")
        assert f"rows here have {seeds} seed" in few


def test_rows_under_other_conditions_are_not_compared(tmp_path: Path) -> None:
    """LoRA-FAIR on easier data leads FedAvg on harder data in every seed: that says nothing."""
    write_runs(tmp_path / "runs")
    for seed in range(3):
        config = {"name": "x", "method": "lora_fair", "seed": seed, "rounds": 2}
        hard = {"task": {"name": "tweets"}, "clients": {"number": 3, "split": "iid"}}
        rate = {"train": {"learning_rate": 0.01}}
        write_run(tmp_path / "runs" / f"hard-{seed}", {**config, **hard, **rate}, 0.1 + 0.01 * seed)
    reader = Reader(page(collect([tmp_path / "runs"])))
    options = [text for _, text in reader.all("option")]
    assert options == ["all", "split = dirichlet", "split = iid"]
    (line,) = reader.all("tr", data_condition="split = iid")
    assert "best" not in line[1]
    (tests,) = reader.all("div", class_="scroll", aria_label="Paired tests")
    assert "split=iid" not in tests[1]


def test_what_comes_from_files_is_escaped(text: str) -> None:
    """The page's own three scripts are the only ones, and nothing in them is from a file."""
    reader = Reader(text)
    assert len(reader.all("script")) == 2
    assert EVIL not in text
    assert len(re.findall("<script", text)) == 2
    ((_, name),) = reader.all("h1")
    assert name == f"bad {EVIL}"
    (_, code) = next(found for found in reader.all("code") if found[1].startswith("$"))
    assert code == f"$ fedlora run '{EVIL}'"
    assert chart(text, "groups")["categories"] == ["calm", EVIL, "worst group"]


def test_attributes_and_json_cannot_be_left(tmp_path: Path) -> None:
    names = ['"><img src=x onerror=alert(1)>', "</script><script>alert(2)</script>", "<!--<script>"]
    for number, name in enumerate(names):
        config = {"name": name, "method": name, "seed": number, "rounds": 2}
        write_run(tmp_path / "runs" / str(number), config, 0.5)
    text = page(collect([tmp_path / "runs"]))
    reader = Reader(text)
    assert not reader.all("img")
    assert len(re.findall("<script", text)) == 2
    assert data_of(text)["rules"] == names
    assert [found["value"] for found, _ in reader.all("input")] == names


def test_it_asks_nobody_for_anything(text: str) -> None:
    assert not re.search(r"https?://|url\((?!#)|@import|//[a-z]+\.[a-z]", text)
    for _, attributes, _ in Reader(text).found:
        assert not {"src", "srcset", "action", "data", "style"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]


def test_the_policy_lets_only_its_own_script_and_style_run(text: str) -> None:
    reader = Reader(text)
    policy = next(a["content"] or "" for a, _ in reader.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    ((_, style),), (_, (_, script)) = reader.all("style"), reader.all("script")
    for kind, found in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy


def test_the_data_in_it_are_the_rows(runs: Path, text: str) -> None:
    assert data_of(text)["rows"] == json.loads(json.dumps(as_json(rows(collect([runs])))))


def test_the_charts_hold_means_and_extremes(text: str) -> None:
    learning = chart(text, "learning")
    assert [line["name"] for line in learning["lines"]] == ["fedavg", "ffa_lora", "lora_fair"]
    assert learning["lines"][2]["points"][2] == pytest.approx([2, 0.805, 0.80, 0.81])
    assert chart(text, "bytes")["lines"][0]["points"][2][0] == pytest.approx(2.2)  # MB, two rounds
    assert chart(text, "worst")["lines"][2]["points"][0] == pytest.approx([0, 0.2, 0.2, 0.2])
    error = chart(text, "error")
    assert [point[0] for point in error["lines"][0]["points"]] == [1, 2]
    assert [point[1] for point in error["lines"][0]["points"]] == pytest.approx([0.1, 0.05])
    assert error["y"]["floor"] == pytest.approx(0.005)
    assert [point[1] for point in error["lines"][1]["points"]] == [0.0, 0.0]  # told as it is
    groups = chart(text, "groups")["lines"][2]["points"]
    assert groups[1] == pytest.approx([1, 0.705, 0.70, 0.71])
    assert groups[2] == pytest.approx([2, 0.705, 0.70, 0.71])
    for figure, _ in Reader(text).all("figure"):
        found = chart(text, str(figure["data-chart"]))
        assert found["title"] and found["x"]["label"]
        assert found["kind"] == "dots" or found["y"]["label"]


def test_errors_by_layer_have_a_place_where_records_tell_them(runs: Path, text: str) -> None:
    assert chart(text, "layers") is None
    found = collect([runs])
    for run in found:
        run.last[BY_LAYER] = {"query": 0.25, "value": 0.0}
    layers = chart(page(found), "layers")
    assert layers["categories"] == ["query", "value"]
    assert short_names([f"encoder.{n}.self.{one}" for n in (0, 1) for one in ("key", "value")]) == [
        "0.key",
        "0.value",
        "1.key",
        "1.value",
    ]
    assert short_names(["encoder.0.key"]) == ["key"]
    assert short_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]
    assert layers["lines"][0]["points"] == [[0, 0.25, 0.25, 0.25], [1, 0.0, 0.0, 0.0]]


def test_the_partition_is_that_of_the_recipe(text: str) -> None:
    """What ``list tasks --partition`` shows of the same settings and the lowest seed."""
    from fedlora.config import ClientsConfig, TaskConfig
    from fedlora.partition import partition, skew
    from fedlora.tasks import load_task

    task = load_task(TaskConfig(name="tweets"))
    found = skew(task, partition(task, ClientsConfig(number=3, split="dirichlet"), 0))
    labels = chart(text, "dealt-0-labels")
    assert [sum(bar) for bar in labels["bars"]] == [row.examples for row in found]
    assert labels["bars"][1] == [found[1].labels[name] for name in labels["parts"]]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"task": {"name": "hub", "options": {"path": "/etc"}}}, "brings no data of its own"),
        ({"clients": {"number": "many"}}, "its configuration is none of this version"),
        ({"clients": {"number": 9, "split": "group"}}, "clients.number: found 9"),
    ],
)
def test_what_cannot_be_dealt_again_is_said(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    text = page(collect([write_runs(tmp_path, 1, **more)]))
    (note,) = [text for _, text in Reader(text).all("p", class_="note") if "Not shown." in text]
    assert reason in note
    assert not [one for one in data_of(text)["charts"] if one["kind"] == "bars"]


def test_the_tasks_that_are_dealt_again_are_there() -> None:
    from fedlora.tasks import TASKS

    assert set(dealt.TASKS) <= set(TASKS) - {"hub"}


def test_promises_are_told_as_stated(tmp_path: Path) -> None:
    privacy = {"unit": "example", "epsilon": 2.0, "delta": 1e-3}
    folder = write_runs(tmp_path, 1, privacy=privacy)
    asked = page(collect([folder]))
    assert asked.count("Asked for: epsilon 2 at most at delta 0.001 for each example.") == 1
    assert "fedavg; ffa_lora; lora_fair" in [text for _, text in Reader(asked).all("h3")]
    stated = {"covered": "What was sent is private", "epsilon": 1.75, "not_covered": [EVIL, "more"]}
    (folder / "fedavg-0" / "privacy.json").write_text(json.dumps(stated))
    told = Reader(page(collect([folder])))
    sections = [text for _, text in told.all("section")]
    assert any("What was sent is private: epsilon 1.75 (seed 0) at delta" in t for t in sections)
    assert f"{EVIL}; more" in [text for _, text in told.all("dd")]


def test_accuracy_against_epsilon_where_runs_differ_in_it(tmp_path: Path) -> None:
    for epsilon in (1.0, 4.0):
        privacy = {"unit": "example", "epsilon": epsilon, "delta": 1e-3}
        write_runs(tmp_path / f"{epsilon}", 1, privacy=privacy)
    text = page(collect([tmp_path / "1.0", tmp_path / "4.0"]))
    found = chart(text, "epsilon")
    assert [label for _, label in found["x"]["ticks"]] == ["1", "4"]
    assert [line["rule"] for line in found["lines"]] == ["fedavg", "ffa_lora", "lora_fair"]
    assert [point[1] for point in found["lines"][0]["points"]] == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("name", ["quickstart", "rules", "robust", "stragglers", "privacy"])
def test_committed_results_have_a_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealt, "TASKS", ())  # whether data was fetched is no matter here
    found = collect([ROOT / "results" / name])
    text = page(found)
    lines = [a for a, _ in Reader(text).all("tr") if "data-row" in a]
    assert len(lines) == len(rows(found))
    assert ("epsilon" in [one["id"] for one in data_of(text)["charts"]]) == (name == "privacy")
    assert ("clock" in [one["id"] for one in data_of(text)["charts"]]) == (name == "stragglers")


def test_of_perplexity_the_least_is_best(tmp_path: Path) -> None:
    for rule, level in (("fedavg", 9.0), ("ffa_lora", 7.0)):
        for seed in range(4):
            score = level + 0.01 * seed * (1 if rule == "fedavg" else -seed)
            folder = tmp_path / f"{rule}-{seed}"
            write_run(folder, {"method": rule, "seed": seed, "rounds": 2}, 0.5)
            text = (folder / "rounds.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            for line in lines:
                line |= {"perplexity": score, "perplexities": {"odes": 2 * score, "lists": 1.0}}
            (folder / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    runs = collect([tmp_path])
    found = compared(runs)
    for key in ("perplexity", "perplexity:odes"):
        (verdict,) = found.verdicts[key]
        assert found.rules[verdict.best] == "ffa_lora" and verdict.supported
    assert "perplexity_before" not in found.verdicts
    drawn = chart(page(runs), "groups")
    assert drawn["x"]["label"] == "perplexity" and drawn["title"].startswith("Perplexity")
    assert drawn["categories"] == ["odes", "lists", "worst group"]
    (own,) = [line for line in drawn["lines"] if "ffa_lora" in str(line)]
    assert own["points"][0][1] == own["points"][2][1] > own["points"][1][1] == 1.0
