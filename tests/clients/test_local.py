"""The reference loop against loops written out by hand."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.local import Rows, batches, evaluate, example_losses, train
from fedlora.adapters import attach
from fedlora.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from fedlora.errors import FedloraError
from fedlora.models import load_model
from fedlora.tasks import load_task


@pytest.fixture
def model_and_rows() -> tuple[nn.Module, list[nn.Parameter], Rows]:
    """A tiny BERT in float64 without dropout, and 20 real rows."""
    base = load_model(ModelConfig(name="tiny_bert", max_length=16), 2, "classify")
    adapted = attach(base, AdapterConfig(rank=2), seed=3)
    module = adapted.module.double()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    examples = load_task(TaskConfig(name="tweets")).train.take(numpy.arange(20))
    rows = Rows(base.encode(examples), torch.from_numpy(examples.labels))
    return module, list(adapted.trained.values()), rows


def test_batches_cover_an_epoch_without_replacement() -> None:
    config = TrainConfig(batch_size=4, steps=0, epochs=2)
    drawn = list(batches(10, config, numpy.random.default_rng(0)))
    assert [len(batch) for batch in drawn] == [4, 4, 2, 4, 4, 2]
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(10))
    assert drawn[:3] != drawn[3:]


@pytest.mark.parametrize(("examples", "steps"), [(1, 5), (3, 1), (100, 7)])
def test_steps_are_what_was_asked(examples: int, steps: int) -> None:
    config = TrainConfig(batch_size=8, steps=steps)
    drawn = list(batches(examples, config, numpy.random.default_rng(0)))
    assert len(drawn) == steps == config.step_count(examples)
    assert all(0 < len(batch) <= 8 for batch in drawn)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_equals_a_loop_by_hand(
    optimizer: str, model_and_rows: tuple[nn.Module, list[nn.Parameter], Rows]
) -> None:
    module, parameters, rows = model_and_rows
    config = TrainConfig(
        optimizer=optimizer, learning_rate=1e-2, batch_size=6, steps=5, weight_decay=0.1
    )
    start = [parameter.detach().clone() for parameter in parameters]
    loss = train(module, parameters, rows, "classify", config, numpy.random.default_rng(7))
    found = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)

    rng, order, losses = numpy.random.default_rng(7), [], []
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(1, 6):
        if len(order) == 0:
            order = list(rng.permutation(20))
        picked, order = [int(row) for row in order[:6]], order[6:]
        value = cross_entropy(module(**rows.inputs(picked)).logits, rows.labels[picked])
        losses.append(float(value.detach()))
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                if optimizer == "sgd":
                    p -= 1e-2 * (g + 0.1 * p)
                    continue
                p *= 1 - 1e-2 * 0.1
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert loss == pytest.approx(sum(losses) / 5, rel=1e-12)
    for mine, by_hand in zip(found, parameters, strict=True):
        torch.testing.assert_close(mine, by_hand.detach(), rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(a, b) for a, b in zip(start, found, strict=True))


def test_clipping_binds(model_and_rows: tuple[nn.Module, list[nn.Parameter], Rows]) -> None:
    module, parameters, rows = model_and_rows
    start = [parameter.detach().clone() for parameter in parameters]
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, steps=1, clip_gradient=1e-3)
    train(module, parameters, rows, "classify", config, numpy.random.default_rng(0))
    moved = torch.cat([(p - s).flatten() for p, s in zip(parameters, start, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_divergence_is_an_error(
    model_and_rows: tuple[nn.Module, list[nn.Parameter], Rows],
) -> None:
    module, parameters, rows = model_and_rows
    config = TrainConfig(optimizer="sgd", learning_rate=1e200, steps=4)
    with pytest.raises(FedloraError, match="diverged"):
        train(module, parameters, rows, "classify", config, numpy.random.default_rng(0))


def test_each_text_has_a_loss_of_its_own() -> None:
    """A causal loss averages over a text's own tokens: as the model's loss on it alone."""
    base = load_model(ModelConfig(name="tiny_llama", max_length=12), 0, "language")
    examples = load_task(TaskConfig(name="tweets_lm")).train.take(numpy.arange(5))
    inputs = base.encode(examples)
    batch, labels = inputs(range(5)), torch.zeros(5, dtype=torch.int64)
    assert len(set(inputs.lengths)) > 1
    module = copy.deepcopy(base.module).double()
    together = example_losses(module(**batch).logits, batch, labels, "language")
    for row in range(5):
        alone = inputs([row])
        theirs = float(module(**alone, labels=alone["input_ids"]).loss.detach())
        assert float(together[row].detach()) == pytest.approx(theirs, rel=1e-6)  # theirs: float32


def test_evaluation_counts_what_a_plain_loop_counts(
    model_and_rows: tuple[nn.Module, list[nn.Parameter], Rows],
) -> None:
    """Groups of 4, 1 and 2 rows, and one of none."""
    module, _, rows = model_and_rows
    order, groups = numpy.array([3, 1, 4, 15, 9, 2, 6]), numpy.array([0, 3, 0, 1, 3, 0, 0])
    batches = []
    with module.register_forward_pre_hook(
        lambda layer, given, named: batches.append(named["input_ids"].shape), with_kwargs=True
    ):
        config = TrainConfig(evaluate_batch_size=3)
        seen = evaluate(module, rows, order, groups, "classify", config)
    assert [shape[0] for shape in batches] == [3, 3, 1]  # several groups in one
    assert batches == sorted(batches, key=lambda shape: shape[1]) != batches[::-1]  # like lengths
    assert list(seen) == [0, 1, 3]
    module.eval()
    for group, measured in seen.items():
        loss = right = 0.0
        for row in order[groups == group].tolist():
            logits = module(**rows.inputs([row])).logits[0].detach()
            label = int(rows.labels[row])
            loss -= float(logits.log_softmax(0)[label])
            right += float(int(logits.argmax()) == label)
        assert (measured.examples, measured.correct) == (int((groups == group).sum()), right)
        assert measured.loss == pytest.approx(loss, rel=1e-9)
    assert evaluate(module, rows, order[:0], groups[:0], "classify", config) == {}


class EverySecond(nn.Module):
    """Knows the next token at even places, and says nothing at odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        known = torch.arange(input_ids.shape[1]) % 2 == 0
        following = nn.functional.one_hot(input_ids.roll(-1, 1), 1000)
        return SimpleNamespace(logits=self.sure * following * known[:, None])


def test_evaluation_of_language_counts_tokens_by_text() -> None:
    base = load_model(ModelConfig(name="tiny_llama", max_length=12), 0, "language")
    inputs = base.encode(load_task(TaskConfig(name="tweets_lm")).train.take(numpy.arange(9)))
    rows, groups = Rows(inputs, torch.zeros(9, dtype=torch.int64)), numpy.arange(9) % 4 // 2
    assert len(set(inputs.lengths)) > 1 and 0 not in torch.tensor(inputs.tokens[0])
    config, order = TrainConfig(evaluate_batch_size=4), numpy.arange(9)[::-1].copy()
    seen = evaluate(EverySecond(), rows, order, groups[::-1], "language", config)
    sure, unsure = math.log1p(999 * math.exp(-5)), math.log(1000)
    for group in (0, 1):
        counts = [inputs.lengths[row] - 1 for row in numpy.flatnonzero(groups == group)]
        shares = [((count + 1) // 2) / count for count in counts]
        loss = sum(share * sure + (1 - share) * unsure for share in shares)
        assert seen[group].examples == len(counts)
        assert seen[group].correct == pytest.approx(sum(shares), rel=1e-6)  # shares in float32
        assert seen[group].loss == pytest.approx(loss, rel=1e-6)
        known = sum((count + 1) // 2 for count in counts)
        nats = known * sure + (sum(counts) - known) * unsure
        assert seen[group].predictions == sum(counts)
        assert seen[group].nats == pytest.approx(nats, rel=1e-6)
