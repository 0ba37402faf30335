"""Language modelling of answers: what is given counts neither in training nor in measuring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy

from clients.local import Rows, evaluate, example_losses
from fedlora.config import ModelConfig, TrainConfig
from fedlora.models import load_model
from fedlora.models.base import TextInputs, encode_texts
from fedlora.models.tiny import tiny_tokenizer
from fedlora.tasks.task import Examples
from simulations.cli import main

NONE = numpy.zeros(2, dtype=numpy.int64)
BOTH = Examples(NONE, NONE, ("", ""), ("not good at all", "bad"), None, ("this is", "it was so so"))


def encoded(max_length: int = 32) -> TextInputs:
    return encode_texts(BOTH, tiny_tokenizer(), max_length)


def test_prompt_and_answer_are_encoded_one_after_the_other() -> None:
    tokenizer, inputs = tiny_tokenizer(), encoded()
    for row in range(2):
        before, after = (
            tokenizer(part[row], add_special_tokens=False)["input_ids"]
            for part in (BOTH.prompts, BOTH.texts)
        )
        assert inputs.tokens[row] == [*before, *after]
        assert inputs.given[row] == len(before)
    assert encoded(3).lengths == [3, 3]
    assert torch.equal(Rows.of(inputs, BOTH).labels, torch.tensor([2, 4]))
    assert torch.equal(Rows.of(inputs, BOTH.take(NONE)).labels, torch.tensor([2, 4]))


def test_only_the_answers_tokens_have_a_loss() -> None:
    inputs = encoded()
    batch = inputs([0, 1])
    torch.manual_seed(0)
    logits = torch.randn(2, batch["input_ids"].shape[1], 1000)
    found = example_losses(logits, batch, torch.tensor([2, 4]), "language")
    for row, (given, length) in enumerate(zip(inputs.given, inputs.lengths, strict=True)):
        targets = batch["input_ids"][row, given:length]
        by_hand = cross_entropy(logits[row, given - 1 : length - 1], targets)
        assert torch.allclose(found[row], by_hand, rtol=1e-5)
    whole = example_losses(logits, batch, torch.zeros(2, dtype=torch.int64), "language")
    assert not torch.allclose(found, whole)
    cut = encoded(3)  # of the second nothing is left to learn
    assert example_losses(logits[:, :3], cut([0, 1]), torch.tensor([2, 4]), "language")[1] == 0


def test_measuring_counts_the_answers_alone() -> None:
    base = load_model(ModelConfig(name="tiny_llama"), 0, "language")
    rows = Rows.of(encoded(), BOTH)
    found = evaluate(base.module, rows, numpy.arange(2), NONE, "language", TrainConfig())
    with torch.no_grad():
        batch = rows.inputs([0, 1])
        losses = example_losses(base.module(**batch).logits, batch, rows.labels, "language")
    assert found[0].loss == pytest.approx(float(losses.double().sum()), rel=1e-6)


def test_a_run_learns_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    for name, rows in (("train", range(40)), ("test", range(40, 50))):
        lines = [
            json.dumps({"question": f"this is {row} is it", "answer": ("good", "so bad")[row % 2]})
            for row in rows
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    changes = {
        "task.name": "hub",
        "task.options.path": folder,
        "task.options.prompt": "question",
        "task.options.text": "answer",
        "task.options.label": '""',
        "model.name": "tiny_llama",
        "adapter.target_modules": '["q_proj", "v_proj"]',
        "train.learning_rate": 5e-2,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "run"
    assert main(["run", "tiny", *sets, "--out", str(out)]) == 0
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert rounds[-1]["loss"] < rounds[0]["loss"] - 0.2
