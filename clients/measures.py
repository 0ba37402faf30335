"""What a client measures: its part of the held-out rows, and rows of its own that never trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
from torch import Tensor

from clients.local import Measured, Rows, evaluate, train
from clients.resident import Resident
from fedlora.adapters import load_into
from fedlora.config import ClientConfig
from fedlora.errors import ConfigError
from fedlora.rounds import GLOBAL, PERSONAL, Factor
from fedlora.seeds import ambient, numpy_generator
from fedlora.stopwatch import turn
from fedlora.tasks.task import Objective

Number = int | float | list[int] | list[float]  # as Flower's records have it


def told(client: int, groups: Mapping[str, Measured], objective: Objective) -> dict[str, Number]:
    """What a client says of the task's held-out rows that it measured, by their groups.

    All are means over examples, of language also ``tokens`` (how many of one's were predicted) and
    ``nats`` (the sum of their losses): averaged over clients by examples, they keep their quotient.

    Raises:
        ConfigError: there were none.
    """
    examples = sum(seen.examples for seen in groups.values())
    if not examples:
        raise ConfigError(f"client {client}: no held-out examples in its share of the data")
    metrics: dict[str, Number] = {
        "num-examples": examples,
        "loss": sum(seen.loss for seen in groups.values()) / examples,
        "accuracy": sum(seen.correct for seen in groups.values()) / examples,
    }
    for name, seen in groups.items():
        metrics[f"group.{name}.accuracy"] = seen.correct / seen.examples
        metrics[f"group.{name}.examples"] = seen.examples
        if objective == "language":
            metrics[f"group.{name}.tokens"] = seen.predictions / seen.examples
            metrics[f"group.{name}.nats"] = seen.nats / seen.examples
    if objective == "language":
        metrics["tokens"] = sum(seen.predictions for seen in groups.values()) / examples
        metrics["nats"] = sum(seen.nats for seen in groups.values()) / examples
    return metrics


def measured(
    here: Resident,
    client: int,
    server_round: int,
    config: ClientConfig,
    factors: Sequence[Factor],
    own: Mapping[str, Tensor],
) -> dict[str, float]:
    """Loss and accuracy of what was loaded, and of what is personal: ``global.loss``, ...

    Personal is what was loaded with the client's ``own`` tensors; a client without any, or that
    never trains, takes ``evaluate.fine_tune_steps`` steps on its training rows from what was
    loaded, cut to its rank, in which ``factors`` and vectors move.

    Raises:
        FedloraError: these steps diverged.
    """
    turn("evaluation")
    rows = here.held_back(client)
    found = {"num-examples": float(len(rows)), **_of(here, rows, config, GLOBAL)}
    with here.as_held_by(client):
        if own and client < config.clients.training:
            load_into(here.model.trained, own)
        else:
            _fine_tune(here, client, server_round, config, factors)
        turn("evaluation")
        return {**found, **_of(here, rows, config, PERSONAL)}


def _of(here: Resident, rows: Rows, config: ClientConfig, name: str) -> dict[str, float]:
    """Mean loss and accuracy of what the model holds."""
    order, objective = numpy.arange(len(rows), dtype=numpy.int64), here.task.objective
    (seen,) = evaluate(here.model.module, rows, order, 0 * order, objective, config.train).values()
    means = {"loss": seen.loss / seen.examples, "accuracy": seen.correct / seen.examples}
    return {f"{name}.{key}": value for key, value in means.items()}


def _fine_tune(
    here: Resident, client: int, server_round: int, config: ClientConfig, factors: Sequence[Factor]
) -> None:
    """The steps, with batches and dropout of streams of their own."""
    steps = config.evaluate.fine_tune_steps
    if not steps:
        return
    settings = config.train.model_copy(update={"steps": steps, "epochs": 0})
    stream = (here.config.seed, "client", client, "round", server_round, "fine-tuning")
    moving, rows = list(here.moving(factors).values()), here.rows(client)
    with ambient(*stream, "dropout"):
        batches = numpy_generator(*stream, "batches")
        train(here.model.module, moving, rows, here.task.objective, settings, batches)
