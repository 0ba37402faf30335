"""Tasks: what they load, how they are split, what they say when they cannot."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from fedlora import fetch
from fedlora.config import TaskConfig
from fedlora.errors import ConfigError
from fedlora.tasks import TASKS, load_task, split
from fedlora.tasks import vader as vader_module
from fedlora.tasks.fashion import read_idx
from fedlora.tasks.task import Examples, Task

FETCHED = ("vader", "digits", "fashion")


def loaded(name: str, **options: object) -> Task:
    """A task by name and options, or a skip that says how to get its data."""
    if name in FETCHED and not fetch.present(name):
        pytest.skip(f"needs: fedlora fetch {name}")
    return load_task(TaskConfig(name=name, options=options))


def parts(task: Task) -> tuple[Examples, Examples, Examples]:
    """Train, validation and test."""
    return task.train, task.validation, task.test


def contents(examples: Examples) -> set[bytes]:
    """What makes each example itself."""
    if examples.images is not None:
        return {image.tobytes() for image in examples.images}
    return {split.text_key(text).encode() for text in examples.texts}


@pytest.mark.parametrize("name", ["tweets", "tweets_lm", "vader", "digits"])
def test_sources_stay_in_one_part_and_nothing_is_there_twice(name: str) -> None:
    task = loaded(name)
    sources = [set(part.natural) for part in parts(task)]
    assert not (sources[0] & sources[1] or sources[0] & sources[2] or sources[1] & sources[2])
    assert len(set.union(*map(contents, parts(task)))) == sum(map(len, parts(task)))
    shares = numpy.array([len(part) for part in sources]) / sum(map(len, sources))
    assert numpy.allclose(shares, (0.7, 0.1, 0.2), atol=0.05)


@pytest.mark.parametrize("name", ["tweets", "tweets_lm", "vader", "digits", "fashion"])
def test_every_label_and_group_is_named_and_met(name: str) -> None:
    task = loaded(name)
    for part in parts(task):
        assert part.labels.dtype == part.groups.dtype == numpy.int64
        assert set(part.groups.tolist()) == set(range(len(task.group_names)))
        assert set(part.labels.tolist()) == set(range(len(task.label_names) or 1))
    if task.train.images is not None:
        assert task.train.images.dtype == numpy.float32
        assert task.train.images.shape[1:] == (1, 28, 28)
        assert task.train.images.min() == 0.0 and task.train.images.max() == 1.0


def test_first_line_of_each_task_describes_it() -> None:
    for function in TASKS.values():
        first = (function.__doc__ or "").splitlines()[0]
        assert 20 < len(first) < 100 and first.endswith(".")


def test_tweets_need_no_fetching() -> None:
    binary, ternary, language = (
        loaded("tweets"),
        loaded("tweets", labels="ternary"),
        loaded("tweets_lm"),
    )
    assert sum(map(len, parts(binary))) == 320
    counts = sum(numpy.bincount(part.labels, minlength=3) for part in parts(ternary))
    assert counts.tolist() == [160, 80, 160]
    assert sum(map(len, parts(language))) == 400
    assert language.objective == "language" and language.label_names == ()
    for part in parts(ternary):
        lengths = numpy.array([len(text.split()) for text in part.texts])
        assert numpy.array_equal(part.groups == 1, lengths > 12)


def test_tweets_are_rows_of_the_published_file() -> None:
    if not fetch.present("vader"):
        pytest.skip("needs: fedlora fetch vader")
    published = {
        (row.natural, row.rating, row.text) for row in vader_module.read(fetch.find("vader"))
    }
    from fedlora.tasks.tweets import read

    assert {(row.natural, row.rating, row.text) for row in read()} <= published


def test_vader_counts() -> None:
    binary, ternary = loaded("vader"), loaded("vader", labels="ternary")
    assert len(vader_module.read(fetch.find("vader"))) == 23_703
    assert sum(map(len, parts(ternary))) == 23_473
    assert binary.group_names == ("tweets", "movie", "amazon", "nyt")
    assert binary.label_names == ("negative", "positive")
    negative, neutral, positive = sum(
        numpy.bincount(part.labels, minlength=3) for part in parts(ternary)
    )
    both = sum(numpy.bincount(part.labels, minlength=2) for part in parts(binary))
    assert neutral > 4_000 and abs(negative - both[0]) < 40 and abs(positive - both[1]) < 40


def test_vader_groups_leave_the_split_alone() -> None:
    whole, nyt = loaded("vader"), loaded("vader", groups=["nyt"])
    assert nyt.group_names == ("nyt",)
    kept = {
        text for text, group in zip(whole.test.texts, whole.test.groups, strict=True) if group == 3
    }
    assert set(nyt.test.texts) == kept
    articles = set.union(*(set(part.natural) for part in parts(nyt)))
    assert 480 < len(articles) <= 498 and all(name.startswith("nyt-") for name in articles)


def test_vader_damaged(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="damaged; remove it and run: fedlora fetch vader"):
        vader_module.read(tmp_path / "archive.tar.gz")


def test_vader_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="run: fedlora fetch vader"):
        TASKS["vader"]()


def test_fashion_rows_are_a_prefix_of_one_order() -> None:
    few, more = loaded("fashion", rows=300), loaded("fashion", rows=400)
    assert len(few.train) == 300 and len(more.train) == 400 and len(few.test) == 10_000
    assert set(few.train.natural) < set(more.train.natural)
    assert few.validation.natural == more.validation.natural
    assert not set(more.train.natural) & set(more.validation.natural)


def test_read_idx(tmp_path: Path) -> None:
    path = tmp_path / "pictures.gz"
    head = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (2, 1, 3))
    path.write_bytes(gzip.compress(head + bytes(range(6))))
    assert read_idx(path).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    for broken in (head + bytes(5), b"\0\0\x0d\x01", b""):
        path.write_bytes(gzip.compress(broken))
        with pytest.raises(ConfigError, match="not a complete IDX file"):
            read_idx(path)
    path.write_bytes(b"plain")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_idx(path)


def test_text_key_ignores_case_space_and_punctuation_of_sentences() -> None:
    assert split.text_key("Had the BEST charm!!") == split.text_key("had the best  charm.")
    assert split.text_key("@anonymous :(") != split.text_key("@anonymous :)")


def test_split_depends_on_task_and_source_only() -> None:
    assert split.position("vader", "nyt-12") == split.position("vader", b"nyt-12")
    assert split.position("vader", "nyt-12") != split.position("tweets", "nyt-12")
    spread = split.positions("any", tuple(str(source) for source in range(4000)))
    assert abs((spread < 0.2).mean() - 0.2) < 0.02 and spread.max() < 1.0


def test_rows_per_group_cuts_what_is_measured_only() -> None:
    whole = load_task(TaskConfig(name="tweets"))
    few = load_task(TaskConfig(name="tweets", rows_per_group=5))
    more = load_task(TaskConfig(name="tweets", rows_per_group=9))
    assert len(few.train) == len(whole.train)
    assert numpy.bincount(few.test.groups).tolist() == [5, 5]
    assert numpy.bincount(few.validation.groups).tolist() == [5, 5]
    assert set(few.test.texts) < set(more.test.texts) < set(whole.test.texts)


def test_the_same_configuration_is_loaded_once() -> None:
    one = load_task(TaskConfig(name="tweets", evaluate="test"))
    assert one is load_task(TaskConfig(name="tweets", evaluate="validation"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vadr", {}, r"task\.name: found 'vadr'.*did you mean 'vader'"),
        ("tweets", {"label": "binary"}, r"task\.options: found 'label'.*'labels'"),
        ("tweets", {"labels": "two"}, r"task\.options\.labels: found 'two'.*'binary'"),
        ("vader", {"groups": ["nit"]}, r"task\.options\.groups\.0: found 'nit'.*'nyt'"),
        ("vader", {"groups": []}, r"task\.options\.groups: found \[\]"),
        ("fashion", {"rows": 0}, r"task\.options\.rows: found 0"),
        ("hub", {}, r"task\.options\.path: missing"),
    ],
)
def test_wrong_options_name_the_place(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(TaskConfig(name=name, options=options))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes rows as ``train.jsonl`` and ``test.jsonl`` and returns their folder."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "mine"
    made.mkdir()

    def write(**tables: list[dict[str, object]]) -> str:
        for name, rows in tables.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (made / f"{name}.jsonl").write_text(lines)
        return str(made)

    return write


def rows(first: int, last: int) -> list[dict[str, object]]:
    """Rows with three sentences per author."""
    return [
        {
            "sentence": f"sentence number {row} of many",
            "mood": ("sad", "glad")[row % 2],
            "author": f"author {row // 3}",
            "kind": ("news", "mail")[row // 3 % 2],
        }
        for row in range(first, last)
    ]


def test_hub_task_from_a_folder_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "mine"
    made.mkdir()
    for name, first, last in (("train", 0, 80), ("test", 79, 100)):
        lines = [f"text number {row} of many,{10 * (row % 3)}" for row in range(first, last)]
        (made / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    task = loaded("hub", path=str(made))
    assert task.label_names == ("0", "10", "20") and task.group_names == ("all",)
    assert len(task.test) == 21 and len(task.train) + len(task.validation) == 79
    assert task.test.texts[1] == "text number 80 of many"
    assert task.test.labels[1] == 80 % 3


def test_hub_task_by_source_and_group(folder: Callable[..., str]) -> None:
    path = folder(train=rows(0, 300))
    task = loaded(
        "hub", path=path, text="sentence", label="mood", natural="author", group="kind", test=""
    )
    assert task.label_names == ("glad", "sad") and task.group_names == ("mail", "news")
    sources = [set(part.natural) for part in parts(task)]
    assert sum(map(len, sources)) == 100 and sum(map(len, parts(task))) == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no column 'text' in 'train'; its columns: sentence, mood, author, kind"),
        ({"text": "sentence", "label": "mood", "natural": "author"}, r"'author 19' .* both"),
        ({"text": "sentence", "label": "mood", "test": "held"}, r"part 'held' cannot be loaded"),
    ],
)
def test_hub_errors_are_one_line(
    folder: Callable[..., str], options: dict[str, object], message: str
) -> None:
    path = folder(train=rows(0, 59), test=rows(59, 80))
    with pytest.raises(ConfigError, match=message) as caught:
        loaded("hub", path=path, **options)
    assert "\n" not in str(caught.value)


def test_hub_names_an_empty_cell(folder: Callable[..., str]) -> None:
    table = [*rows(0, 5), {"sentence": "no mood", "mood": None, "author": "a", "kind": "news"}]
    with pytest.raises(ConfigError, match="column 'mood' has no value in row 5"):
        loaded("hub", path=folder(train=table), text="sentence", label="mood", test="")


def test_hub_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*offline") as caught:
        loaded("hub", path="nobody/nothing")
    assert "\n" not in str(caught.value)
