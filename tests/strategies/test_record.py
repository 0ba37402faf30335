"""A round's record: perplexity over tokens, whoever measured them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from flwr.app import RecordDict

from clients.local import Measured
from clients.measures import told
from fedlora.rounds import RoundRecord
from fedlora.tasks.task import Objective
from strategies.record import Trace
from strategies.replies import Reply, mean_metrics


def measured(
    parts: list[dict[str, Measured]], objective: Objective = "language", **more: float
) -> RoundRecord:
    """The record of what clients measured, each by group; ``more`` is what all say besides."""
    replies = []
    for client, groups in enumerate(parts):
        metrics = told(client, groups, objective)
        examples = float(metrics.pop("num-examples"))  # type: ignore[arg-type]
        numbers = {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]
        replies.append(Reply(client, client, RecordDict(), examples, {**numbers, **more}))
    return Trace().record(1, None, mean_metrics(replies), 1.0)


def seen(examples: int, tokens: int, nats: float) -> Measured:
    return Measured(examples, loss=1.0 * examples, correct=0.5, predictions=tokens, nats=nats)


def near(groups: Mapping[str, float]) -> object:
    return pytest.approx({name: math.exp(value) for name, value in groups.items()}, rel=1e-12)


def test_every_token_counts_the_same_whoever_measured_it() -> None:
    parts = [
        {"odes": seen(3, 10, 20.0), "lists": seen(1, 30, 30.0)},
        {"odes": seen(1, 50, 40.0)},
    ]
    found = measured(parts)
    assert found.perplexity == pytest.approx(math.exp(90 / 90), rel=1e-12)
    assert found.perplexities == near({"odes": 60 / 60, "lists": 1.0})
    parts[1]["odes"] = seen(1, 50, 60.0)
    found = measured(parts)
    assert found.perplexity == pytest.approx(math.exp(110 / 90), rel=1e-12)
    assert found.perplexities == near({"odes": 80 / 60, "lists": 1.0})
    assert found.loss == pytest.approx(1.0)  # over texts, which is another mean
    assert set(found.groups) == {"odes", "lists"}


def test_there_is_none_of_classes_of_no_tokens_and_beyond_floats() -> None:
    part = {"odes": seen(3, 10, 20.0)}
    assert measured([part], "classify").perplexity is None
    assert measured([part], "classify").perplexities == {}
    assert measured([{"odes": seen(3, 0, 0.0)}]).perplexity is None
    found = measured([part, part], nats=1e9)  # what a hostile client may say
    assert found.perplexity is None and set(found.perplexities) == {"odes"}
