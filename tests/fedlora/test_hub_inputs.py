"""The hub task on files as the hub gives them: pairs, pictures, and answers to prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedlora.config import TaskConfig
from fedlora.errors import ConfigError, MissingDataError
from fedlora.models.base import encode_texts
from fedlora.tasks import load_task
from fedlora.tasks.task import Examples, Task

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")
Write = Callable[..., str]


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes columns with the hub's own types as Parquet files, and returns their folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(features: dict[str, object], **tables: dict[str, list[object]]) -> str:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        for name, columns in tables.items():
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(str(folder / f"{name}.parquet"))
        return str(folder)

    return write


def loaded(**options: object) -> Task:
    return load_task(TaskConfig(name="hub", options=options))


def contents(task: Task) -> list[Examples]:
    return [task.train, task.validation, task.test]


def picture(*colour: int, size: tuple[int, int] = (6, 4)) -> object:
    return Image.new("RGB", size, colour)


def test_pairs_are_put_together(parquet: Write) -> None:
    names = ["entailment", "neutral", "contradiction"]
    features = {
        "premise": datasets.Value("string"),
        "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
        "idx": datasets.Value("int32"),
    }

    def rows(first: int, last: int) -> dict[str, list[object]]:
        each = range(first, last)
        return {
            "premise": [f"premise {row}" for row in each],
            "hypothesis": [f"hypothesis {row}" for row in each],
            "label": [row % 3 for row in each],
            "idx": list(each),
        }

    path = parquet(features, train=rows(0, 60), validation=rows(60, 90))
    pair = {"text": "premise", "second": "hypothesis", "separator": "</s></s>"}
    task = loaded(path=path, test="validation", **pair)
    assert task.label_names == tuple(names)
    assert len(task.test) == 30 and sum(map(len, contents(task))) == 90
    assert task.test.texts[0] == "premise 60</s></s>hypothesis 60"
    with pytest.raises(ConfigError, match=r"no column 'hypotheses' in 'train'"):
        loaded(path=path, test="validation", text="premise", second="hypotheses")


def letters(processor: processors.PostProcessor) -> PreTrainedTokenizerFast:
    """A tokeniser of letters with RoBERTa's special tokens."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words |= {letter: 4 + place for place, letter in enumerate(alphabet)}
    own = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processor
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_an_answer_begins_no_text_of_its_own() -> None:
    tokenizer = letters(processors.TemplateProcessing("<s> $A", None, [("<s>", 0)]))
    none = numpy.zeros(1, dtype=numpy.int64)
    found = encode_texts(Examples(none, none, ("",), ("12",), None, ("7+5=",)), tokenizer, 99)
    assert found.tokens == [tokenizer("7+5=12")["input_ids"]]
    assert found.given == [5] and found.lengths == [7]


def test_robertas_separator_gives_its_own_pairs() -> None:
    """One text with ``</s></s>`` in it has the ids that RoBERTa gives two texts."""
    tokenizer = letters(processors.RobertaProcessing(("</s>", 2), ("<s>", 0)))
    one, two = "A man eats.", "He is hungry."
    none = numpy.zeros(1, dtype=numpy.int64)
    texts = Examples(none, none, ("",), (f"{one}</s></s>{two}",))
    assert encode_texts(texts, tokenizer, 99).tokens == [tokenizer(one, two)["input_ids"]]


def test_pictures_of_a_parquet_file(parquet: Write) -> None:
    features = {
        "image": datasets.Image(),
        "domain": datasets.ClassLabel(names=["clipart", "sketch"]),
        "label": datasets.ClassLabel(names=["cat", "dog", "owl"]),
    }

    def rows(count: int, blue: int) -> dict[str, list[object]]:
        return {
            "image": [picture(5 * row, 255, blue) for row in range(count)],
            "domain": [row % 2 for row in range(count)],
            "label": [row % 3 for row in range(count)],
        }

    path = parquet(features, train=rows(40, 0), test=rows(9, 51))
    look = {"image": "image", "group": "domain", "size": 8}
    task = loaded(path=path, **look)
    assert task.label_names == ("cat", "dog", "owl") and task.group_names == ("0", "1")
    images = task.test.images
    assert images is not None and images.shape == (9, 3, 8, 8) and images.dtype == numpy.float32
    assert numpy.allclose(images[3, :, 0, 0], [15 / 255, 1.0, 0.2])
    assert task.test.groups.tolist() == [0, 1] * 4 + [0]
    few = loaded(path=path, first_labels=2, **look)
    assert few.label_names == ("cat", "dog") and len(few.test) == 6
    assert few.test.labels.tolist() == [0, 1] * 3
    assert few.test.images is not None and numpy.array_equal(few.test.images[2], images[3])
    assert sum(map(len, contents(few))) == 27 + 6
    grey = loaded(path=path, **look, grey=True)
    assert grey.test.images is not None and grey.test.images.shape[1:] == (1, 8, 8)
    with pytest.raises(ConfigError, match=r"task\.options\.image: found a column of ClassLabel"):
        loaded(path=path, image="domain")


def test_pictures_of_a_folder_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "nico"
    lines = ["file_name,label,domain"]
    for row in range(24):
        name = f"{('dim', 'rock')[row % 2]}/{row}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(row, 9 * row, 0).save(folder / name)
        lines.append(f"{name},{('bear', 'wolf')[row // 2 % 2]},{('dim', 'rock')[row % 2]}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    task = loaded(path=str(folder), image="image", group="domain", test="")
    assert task.label_names == ("bear", "wolf") and task.group_names == ("dim", "rock")
    assert sum(map(len, contents(task))) == 24
    picture(1, 2, 3, size=(5, 4)).save(folder / "rock/7.png")
    other = tmp_path / "other"
    folder.rename(other)
    with pytest.raises(ConfigError, match=r"found 4 x 5 pixels in row 7, allowed: 4 x 6 as in"):
        loaded(path=str(other), image="image", group="domain", test="")


def sums(first: int, last: int) -> dict[str, list[object]]:
    """Questions of which some have the same answer."""
    each = range(first, last)
    return {
        "question": [f"What is {row} less {row - row % 5}?" for row in each],
        "answer": [f"It is {row % 5}." for row in each],
    }


def test_answers_to_prompts(parquet: Write) -> None:
    text = datasets.Value("string")
    path = parquet({"question": text, "answer": text}, train=sums(0, 50), test=sums(50, 60))
    task = loaded(path=path, prompt="question", text="answer", label="")
    assert task.objective == "language" and task.label_names == () and len(task.test) == 10
    assert sum(map(len, contents(task))) == 60  # equal answers to other questions are no doubles
    assert task.test.prompts[7] == "What is 57 less 55?" and task.test.texts[7] == "It is 2."


def test_what_is_not_here_is_told_from_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDataError, match="offline"):
        loaded(path="nobody/nothing")
    with pytest.raises(ConfigError) as caught:
        loaded(path=str(tmp_path))
    assert not isinstance(caught.value, MissingDataError)
