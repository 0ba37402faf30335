"""Own rows: every kind of file, shares that are held out, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from fedlora.config import ClientsConfig, TaskConfig
from fedlora.errors import ConfigError, DataError
from fedlora.partition import deal, partition, skew
from fedlora.tasks import load_own, load_task
from fedlora.tasks.task import Task

LABELS = ["bad", "good"]
ROWS = [{"text": f"number {k}, said\nquickly", "label": LABELS[k % 2]} for k in range(20)]


def config(path: object, **options: Any) -> TaskConfig:
    return TaskConfig(name="local", options={"path": str(path), "labels": LABELS, **options})


def csv_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    from tests.simulations.own_files import WRITERS

    WRITERS[path.suffix[1:]](path, rows)
    return path


def texts(task: Task) -> list[str]:
    return sorted([*task.train.texts, *task.validation.texts, *task.test.texts])


def test_the_task_itself_holds_no_rows() -> None:
    task = load_task(config(""))
    assert task.label_names == ("bad", "good") and task.objective == "classify"
    assert len(task.train) == len(task.validation) == len(task.test) == 0
    assert load_task(TaskConfig(name="local")).objective == "language"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"0.{kind}", ROWS)
    task = load_own(config(tmp_path / f"{{client}}.{kind}"), 0)
    assert texts(task) == sorted(row["text"] for row in ROWS)
    for part in (task.train, task.validation, task.test):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert {"text": text, "label": LABELS[label]} in ROWS
    assert (len(task.train), len(task.validation), len(task.test)) == (14, 2, 4)
    assert task.group_names == ("client-0",)


def test_rows_keep_the_order_of_their_file_and_their_part_whatever_else_is_there(
    tmp_path: Path,
) -> None:
    write(tmp_path / "0.csv", ROWS)
    write(tmp_path / "1.csv", ROWS[::-1])
    one, other = (load_own(config(tmp_path / "{client}.csv"), client) for client in (0, 1))
    numbers = [ROWS.index({"text": t, "label": LABELS[k]}) for t, k in _pairs(one)]
    assert numbers == sorted(numbers)
    assert set(one.test.texts) == set(other.test.texts)
    assert one.train.texts == other.train.texts[::-1]


def _pairs(task: Task) -> list[tuple[str, int]]:
    return list(zip(task.train.texts, task.train.labels.tolist(), strict=True))


def test_a_source_and_a_text_that_is_there_twice_lie_in_one_part(tmp_path: Path) -> None:
    twice = [{**row, "who": f"writer {k % 7}"} for k, row in enumerate(ROWS)] * 2
    write(tmp_path / "0.csv", twice)
    for options in ({}, {"natural": "who"}):
        task = load_own(config(tmp_path / "{client}.csv", **options), 0)
        sources = [set(part.natural) for part in (task.train, task.validation, task.test)]
        assert all(sources) and not sources[0] & (sources[1] | sources[2])
        assert not sources[1] & sources[2]
        assert not set(task.train.texts) & set(task.test.texts)
        assert len(texts(task)) == 40


def test_shares_and_a_held_out_place(tmp_path: Path) -> None:
    write(tmp_path / "0.csv", ROWS)
    write(tmp_path / "0-later.csv", ROWS[:3])
    half = load_own(config(tmp_path / "{client}.csv", test=0.5, validation=0.0), 0)
    assert (len(half.train), len(half.validation), len(half.test)) == (10, 0, 10)
    apart = load_own(
        config(
            tmp_path / "{client}.csv", held_out=str(tmp_path / "{client}-later.csv"), validation=0.0
        ),
        0,
    )
    assert apart.train.texts == tuple(row["text"] for row in ROWS)
    assert apart.test.texts == tuple(row["text"] for row in ROWS[:3])


def test_columns_have_names_and_a_second_text_follows_the_first(tmp_path: Path) -> None:
    rows = [{"q": f"why {k}", "a": f"so {k}", "y": k % 2, "g": "ab"[k % 2]} for k in range(9)]
    write(tmp_path / "0.jsonl", rows)
    options = {"text": "q", "second": "a", "separator": " | ", "label": "y", "group": "g"}
    task = load_own(config(tmp_path / "{client}.jsonl", **{**options, "labels": ["0", "1"]}), 0)
    assert "why 0 | so 0" in texts(task)
    assert task.group_names == ("a", "b")
    assert numpy.array_equal(task.train.groups, task.train.labels)


def test_without_labels_it_is_language_modelling(tmp_path: Path) -> None:
    write(tmp_path / "0.csv", [{"text": f"word {k}"} for k in range(9)])
    task = load_own(config(tmp_path / "{client}.csv", labels=[]), 0)
    assert task.objective == "language" and not task.train.labels.any()


def test_a_folder_holds_an_entry_for_each_client_by_number(tmp_path: Path) -> None:
    for client in range(11):
        write(tmp_path / f"site-{client}.csv", [{**row, "text": f"{client}"} for row in ROWS[:1]])
        with (tmp_path / f"site-{client}.csv").open("a") as file:
            file.writelines(f"{client} {k},good\n" for k in range(9))
    (tmp_path / ".hidden").touch()
    assert load_own(config(tmp_path), 2).train.texts[0].startswith("2")
    assert load_own(config(tmp_path), 10).train.texts[0].startswith("10")
    with pytest.raises(DataError, match=r"found 11 entries in .*, none for client 11"):
        load_own(config(tmp_path), 11)


def test_a_node_names_its_own_place(tmp_path: Path) -> None:
    """Whatever the recipe says, nothing else is looked at."""
    write(tmp_path / "mine.csv", ROWS)
    task = load_own(config("/no/such/{client}.csv"), 7, data=str(tmp_path / "mine.csv"))
    assert len(texts(task)) == 20 and task.group_names == ("client-7",)
    apart = config("{client}.csv", held_out="{client}-test.csv")
    with pytest.raises(ConfigError, match="must name them too, as 'held-out'"):
        load_own(apart, 7, data=str(tmp_path / "mine.csv"))
    both = load_own(apart, 7, str(tmp_path / "mine.csv"), str(tmp_path / "mine.csv"))
    assert len(both.test) == 20


def picture(path: Path, shade: int, size: tuple[int, int] = (6, 5)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255)).save(path)


def test_pictures_by_subfolder_and_by_table(tmp_path: Path) -> None:
    for k in range(12):
        picture(tmp_path / "0" / LABELS[k % 2] / f"{k}.png", 10 * k)
        picture(tmp_path / "1" / "all" / f"{k}.png", 10 * k)
    rows = [{"file": f"all/{k}.png", "label": LABELS[k % 2], "by": "ab"[k // 6]} for k in range(12)]
    write(tmp_path / "1" / "labels.csv", rows)
    plain = load_own(config(tmp_path / "{client}"), 0)
    table = load_own(config(tmp_path / "{client}"), 1)
    grouped = load_own(config(tmp_path / "{client}", group="by"), 1)
    for task in (plain, table, grouped):
        shades = []
        for part in (task.train, task.validation, task.test):
            assert part.images is not None and part.images.dtype == numpy.float32
            assert part.images.shape[1:] == (3, 5, 6)
            assert (part.images[:, 2] == 1).all() and (part.images[:, 1] == 0).all()
            found = numpy.rint(part.images[:, 0, 0, 0] * 25.5).astype(int)
            assert numpy.array_equal(found % 2, part.labels)
            shades += found.tolist()
        assert sorted(shades) == list(range(12))
    assert grouped.group_names == ("a", "b")
    small = load_own(config(tmp_path / "{client}", size=4, grey=True), 0)
    assert small.train.images is not None and small.train.images.shape[1:] == (1, 4, 4)


def test_counts_of_all_clients_are_dealt_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "0.csv", ROWS)
    write(tmp_path / "1.csv", ROWS[:10])
    own = ClientsConfig(number=2, split="own")
    task, parts = deal(config(tmp_path / "{client}.csv"), own, 0)
    assert [len(part) for part in parts] == [14, 7]
    assert [row.groups for row in skew(task, parts)] == [
        {"client-0": 14, "client-1": 0},
        {"client-0": 0, "client-1": 7},
    ]
    alone = load_own(config(tmp_path / "{client}.csv"), 1)
    assert task.train.take(parts[1]).texts == alone.train.texts
    with pytest.raises(ConfigError, match=r"clients\.split: found 'group', allowed: 'own' with"):
        deal(config(tmp_path / "{client}.csv"), ClientsConfig(number=2), 0)
    with pytest.raises(ConfigError, match=r"clients\.split: found 'own', allowed: .*'tweets'"):
        partition(load_task(TaskConfig(name="tweets")), own, 0)


SECRET = "nobody is to read this"
BROKEN = {
    "no.csv": (None, "found no such file", ""),
    "empty.csv": ("", "found no rows", ""),
    "header.csv": ("text,label\n", "found no rows", ""),
    "column.csv": (f"words,label\n{SECRET},bad\n", r"line 2: found column\(s\) words, label", "2"),
    "twice.csv": ("text,text,label\na,b,bad\n", "line 1: found column 'text' twice", "1"),
    "label.csv": (f"text,label\na,good\n{SECRET},medium\n", "line 3: found 'medium', allowed", "3"),
    "cells.csv": (f"text,label\n{SECRET},with a comma,bad\n", "line 2: found 3 cells", "2"),
    "quote.csv": (f'text,label\n"{SECRET},bad\n', "line 2: not valid CSV", "2"),
    "white.csv": ('text,label\n"  ",bad\n', "line 2, column 'text': found white space", "2"),
    "nothing.csv": (f"text,label\n{SECRET},\n", "line 2, column 'label': found nothing", "2"),
    "bytes.csv": (b"text,label\n\xff\xfe,bad\n", "found byte 0xff at 11, allowed: UTF-8", ""),
    "half.jsonl": (f'{{"text": "{SECRET}", "lab', "line 1: found no JSON object", "1"),
    "list.jsonl": ("\n[1, 2]\n", "line 2: found no JSON object", "2"),
    "inner.jsonl": ('{"text": {"a": 1}, "label": "bad"}', "line 1, .*found dict", "1"),
    "null.jsonl": ('{"text": null, "label": "bad"}', "line 1, .*found nothing", "1"),
    "not.parquet": (b"PAR1 and no more", "not a whole parquet file", ""),
    "table.xlsx": ("a", r"found '\.xlsx', allowed: \.csv", ""),
    "few.csv": ("text,label\nalone,bad\n", r"1 source\(s\) in 1 row\(s\)", ""),
    "same.csv": ("text,label\n" + "same again and again,bad\n" * 9, r"1 source\(s\) in 9", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line_with_the_file_and_the_line(tmp_path: Path, name: str) -> None:
    """And no line of it is told to others, nor any cell."""
    content, message, line = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_own(config(tmp_path / name), 3, data=str(tmp_path / name))
    said = str(caught.value)
    assert "\n" not in said and SECRET not in said
    assert name in said or name in ("few.csv", "same.csv")
    place = f" (line {line})" if line else ""
    told = caught.value.told(3)
    assert told == f"client 3: its rows cannot be read{place}; its own log says what is wrong"


def test_broken_pictures(tmp_path: Path) -> None:
    def wrong(message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_own(config("", **options), 0, data=str(tmp_path))
        assert "\n" not in str(caught.value)

    wrong("found no pictures")
    picture(tmp_path / "bad" / "a.png", 1)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    wrong("b.png: not a whole picture")
    picture(tmp_path / "good" / "b.png", 1, (7, 7))
    wrong("b.png: found 7 x 7 pixels, allowed: 5 x 6 as a.png")
    wrong("found no table, allowed: labels.csv with columns file, label, by", group="by")
    wrong("found a folder, allowed: a file of texts", labels=[])
    (tmp_path / "middling").mkdir()
    wrong("found 'middling', allowed: bad, good")
    outside = {"file": "../../secret.png", "label": "bad"}
    write(tmp_path / "labels.jsonl", [outside])
    wrong("labels.jsonl, line 1: found a file outside")
    write(tmp_path / "labels.jsonl", [{"file": "good/none.png", "label": "bad"}])
    wrong("none.png: found no such file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"task\.options\.path: found '', allowed: a path with \{client\}"),
        ({"path": "/no/such"}, r"task\.options\.path: found '/no/such'"),
        ({"labels": ["one"]}, r"task\.options\.labels: found \['one'\], allowed: two or more"),
        ({"labels": ["a", "a"]}, r"task\.options\.labels"),
        ({"test": 1.0}, r"task\.options\.test"),
        ({"pathh": "x"}, r"task\.options: found 'pathh'.*did you mean 'path'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_own(config(**{"path": "x", **options}), 0)


def test_no_rows_to_choose_settings_on(tmp_path: Path) -> None:
    write(tmp_path / "0.csv", ROWS)
    choosing = config(tmp_path / "{client}.csv", validation=0.0)
    with pytest.raises(ConfigError, match=r"task\.options\.validation: found 0\.0, allowed: above"):
        load_own(choosing.model_copy(update={"evaluate": "validation"}), 0)
    with pytest.raises(ConfigError, match="its rows are dealt to clients"):
        load_own(TaskConfig(name="tweets"), 0)


def test_long_cells_are_cut_in_errors(tmp_path: Path) -> None:
    write(tmp_path / "0.csv", [{"text": "a", "label": "x" * 500}])
    with pytest.raises(DataError) as caught:
        load_own(config(tmp_path / "{client}.csv"), 0)
    assert f"{'x' * 40}..." in str(caught.value) and "x" * 41 not in str(caught.value)


def test_numbers_as_other_programs_write_them(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t {k}", "label": value}) for k, value in enumerate([1.0, 0, 1])]
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    task = load_own(config(tmp_path / "{client}.jsonl", labels=["0", "1"], validation=0.0), 0)
    assert sorted([*task.train.labels.tolist(), *task.test.labels.tolist()]) == [0, 1, 1]
