"""The bench room: what is measured is fair, and what is printed and written is what was measured.

No test looks at a time.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from fedlora.config import ModelConfig
from fedlora.models import load_model
from simulations import bench
from simulations.bench_cohort import CROWDS, Crowd, bert, cohort, packs, ready
from simulations.bench_inputs import LENGTH, images, texts
from simulations.bench_pairs import Case, Row, measure
from simulations.bench_privacy import CROWDS as PRIVATE_CROWDS
from simulations.bench_privacy import MANY, SUBJECTS, Subject, privacy
from simulations.cli import main

QUICK = tuple(
    dataclasses.replace(subject, steps=1, allowed=0.0 if subject.model == "tiny_bert" else None)
    for subject in SUBJECTS
    if subject.model != "minilm"
)
FILES = ["table.md", "table.csv", "ratios.png", "environment.json"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of one toy, which is allowed no time at all."""
    function = partial(privacy, subjects=QUICK[:1], crowds=())
    monkeypatch.setitem(bench.BENCHES, "privacy", (bench.BENCHES["privacy"][0], function))


def clocked(name: str, calls: list[str], done: float = 1.0) -> Callable[[], float]:
    def work() -> float:
        calls.append(name)
        return done

    return work


def test_sides_take_turns_after_one_of_each_is_thrown_away() -> None:
    calls: list[str] = []
    told: list[str] = []
    case = Case("a case", clocked("ours", calls), clocked("peer", calls), allowed=2.0)
    row = measure(case, 3, told.append)
    assert calls == ["ours", "peer"] * 4
    assert (row.case, row.pairs, row.allowed, row.clock) == ("a case", 3, 2.0, "wall")
    assert row.least <= row.ratio <= row.greatest
    assert told[-1] == "a case: pair 3 of 3"


def test_time_is_per_unit_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    case = Case("a case", clocked("ours", [], done=4), clocked("peer", [], done=2))
    row = measure(case, 2, lambda text: None)
    assert (row.ours, row.peer, row.ratio) == (250.0, 500.0, 0.5)  # a second each, in ms


def test_a_speed_up_is_the_peers_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    ours, peer = clocked("ours", [], done=4), clocked("peer", [], done=2)
    for allowed, missed in ((1.9, False), (2.1, True), (None, False)):
        row = measure(Case("a case", ours, peer, allowed, sense="at least"), 2, lambda text: None)
        assert (row.ratio, row.least, row.ratio_wall, row.missed) == (2.0, 2.0, 2.0, missed)
    wanted = dataclasses.replace(row, allowed=2.1)
    assert bench.cells(wanted)[-2:] == ["2.00", "at least 2.1 (missed)"]
    assert bench.notes([wanted])[-1] == "Missed: a case is 2.000, allowed: at least 2.1."
    assert "the peer's time over ours" in bench.notes([wanted])[0]


@pytest.mark.parametrize("subject", QUICK, ids=lambda subject: subject.model)
def test_both_sides_do_the_same_steps_on_the_same_examples(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches as they reach the model: equal shapes on both sides, 16 rows, 32 tokens."""
    from simulations.bench_privacy import cases

    found = list(cases(subject, varying=True))
    assert [case.name.split(": ")[1] for case in found] == [
        "over plain",
        "over bare Opacus",
        f"over plain, {MANY} examples",
    ]
    module = found[0].ours.__self__.module  # type: ignore[attr-defined]
    shapes: list[Sequence[int]] = []
    module.register_forward_pre_hook(
        lambda layer, given, named: shapes.append(list(next(iter(named.values())).shape)),
        with_kwargs=True,
    )
    for case in found[:2]:
        for work in (case.ours, case.peer):
            shapes.clear()
            assert work() == 1
            assert shapes[-1][0] == 16
            assert subject.images or shapes[-1][1] == LENGTH
    for work in (found[2].ours, found[2].peer):
        shapes.clear()
        assert work() == shapes[-1][0]


@pytest.mark.slow
def test_every_subject_has_its_lines() -> None:
    crowd = Crowd("toy", bert(16, 1), clients=3, batch_size=2, steps=1)
    rows = privacy(1, lambda text: None, QUICK, [crowd])
    names = [row.case for row in rows]
    assert len(rows) == 2 * len(QUICK) + 2
    assert names[-1] == "toy, 3 clients, batch 2: private packs of 3 over plain"
    assert rows[-1].allowed == 1.3
    assert [crowd.label for crowd in PRIVATE_CROWDS] == ["tiny", "mid", "minilm, 3 layers"]
    assert len(set(names)) == len(names)
    assert all(row.ours > 0 and row.peer > 0 and row.pairs == 1 for row in rows)
    minilm = SUBJECTS[0]
    assert (minilm.model, minilm.allowed) == ("minilm", 1.35)


def test_examples_are_the_same_each_time_and_texts_of_one_length() -> None:
    assert texts(3).texts == texts(3).texts
    one, other = images(3).images, images(3).images
    assert one is not None and other is not None and (one == other).all()
    base = load_model(ModelConfig(name="tiny_bert", max_length=LENGTH), 2, "classify")
    assert set(base.encode(texts(MANY)).lengths) == {LENGTH}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_table_says_what_was_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["bench", "privacy", "--pairs", "2", "--out", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr()
    for word in ("case", "ours", "peer", "ratio", "allowed", "tiny_bert: over plain", "missed"):
        assert word in printed.out
    assert "Missed: tiny_bert: over plain" in printed.out
    assert printed.err.splitlines()[0] == "tiny_bert"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(FILES)
    assert (tmp_path / "b" / "ratios.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "b" / "table.csv").read_text().splitlines()))
    assert [line["pairs"] for line in lines] == ["2", "2", "2"]
    markdown = (tmp_path / "b" / "table.md").read_text()
    assert "| case | ours | peer | ratio | allowed |" in markdown
    assert "in processor time, 1 torch thread;" in markdown
    environment = json.loads((tmp_path / "b" / "environment.json").read_text())
    assert environment["threads"] == 1
    assert torch.get_num_threads() == threads
    again = main(["bench", "privacy", "--pairs", "1", "--out", str(tmp_path / "b"), "--json"])
    assert again == 0  # a bench is repeated in its folder


SMALL = Crowd("tiny", bert(32, 1), clients=5, batch_size=2, steps=2, plain=0.0, private=0.0)


def test_packs_and_one_by_one_see_the_same_rows() -> None:
    here, seen = ready(SMALL), []
    here.module.register_forward_pre_hook(
        lambda layer, given, named: seen.append(named["input_ids"].tolist()), with_kwargs=True
    )

    def rows(work: Callable[[], int]) -> list[list[int]]:
        seen.clear()
        assert work() == SMALL.steps * SMALL.clients
        return sorted(row for batch in seen for row in batch)

    alone = rows(here.alone)
    assert len(alone) == SMALL.steps * SMALL.clients * SMALL.batch_size
    assert all(len(row) == LENGTH for row in alone)
    for size in (1, 2, 5):
        assert rows(partial(here.packs, size)) == alone
    counts = []
    for work, trainings in (
        (here.alone_privately, 5),
        (partial(here.private_packs, 2), 3),
        (partial(here.private_packs, 5), 1),
    ):
        seen.clear()
        work()
        counts.append(sum(map(len, seen)) - 3 * trainings)  # each looks at one row, then at two
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.slow
def test_every_crowd_has_its_lines() -> None:
    found = cohort(1, lambda text: None, [SMALL])
    assert [row.case.split(": ")[1][:15] for row in found] == ["packs of 5", "private packs o"]
    assert all(row.sense == "at least" and not row.missed and row.ours > 0 for row in found)
    found = packs(1, lambda text: None, [(SMALL, (2, 3))])
    assert [row.case.rpartition(": ")[2] for row in found] == [
        "packs of 2",
        "packs of 3",
        "private packs of 2",
        "private packs of 3",
    ]
    promised = {(crowd.label, crowd.batch_size): crowd for crowd in CROWDS if not crowd.hard}
    assert (promised["tiny", 4].clients, promised["tiny", 4].plain) == (64, 2.5)
    assert promised["tiny", 4].private == 4.0
    assert (promised["mid", 4].clients, promised["mid", 4].plain) == (16, 1.2)
    others = [crowd for crowd in CROWDS if crowd.hard or crowd.model.name == "minilm"]
    assert {promise for crowd in others for promise in (crowd.plain, crowd.private)} == {0.97}


@pytest.mark.slow
def test_quick_is_fewer_lines_and_fewer_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.QUICK.keys() <= bench.BENCHES.keys()
    monkeypatch.setitem(bench.QUICK, "cohort", partial(cohort, crowds=[SMALL]))
    assert main(["bench", "cohort", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["pairs"] for row in rows] == [2, 2]
    assert {"case", "ours", "peer", "ratio"} <= rows[0].keys()
    assert main(["bench", "cohort", "--quick", "--pairs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["pairs"] == 1


@pytest.mark.usefixtures("quick")
def test_json_has_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "privacy", "--pairs", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bench"] == "privacy"
    assert document["written"] == []
    for row in document["rows"]:
        assert row.keys() == {field.name for field in dataclasses.fields(Row)}
        assert row.keys() >= {"case", "ours", "peer", "ratio", "allowed", "unit", "pairs"}
        assert row["ratio"] > 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["bench", "privcy"], "did you mean 'privacy'?"),
        (["bench"], "Missing argument 'NAME'"),
        (["bench", "privacy", "--pairs", "0"], "--pairs"),
        (["bench", "privacy", "--out", "/dev/null/x", "--pairs", "1"], "--out"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_mistakes(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert printed.err.splitlines()[-1].startswith("fedlora: ")
