"""How long a run would take: a few steps and a part of an evaluation, measured, then multiplied."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clients.local import Measured
from clients.packs import train_pack, train_private_pack
from clients.resident import Resident
from fedlora.calibration import ClientPlan
from fedlora.config import RunConfig
from simulations.forecast import drawn, in_turn, packs_of
from simulations.server_app import evaluating
from strategies import LoraStrategy

ROUNDS = 50  # so many are worked out one by one; more are taken to be like them
RELEASE = "dry run"
MORE = 2  # steps measured beside the first, which also has what a client costs once


@dataclass(frozen=True)
class Timing:
    """What was measured, in seconds.

    Attributes:
        load: task, model and adapter.
        step: of a whole pack, or of one client without packs.
        once: of the same in each round, whatever its steps.
        encode: of a training example, once.
        evaluate: of a held-out example.
        encode_held_out: of all held-out examples, once in each worker.
    """

    load: float
    step: float
    once: float
    encode: float
    evaluate: float
    encode_held_out: float


@dataclass(frozen=True)
class Times:
    """What follows for the run, in seconds, if the workers do not slow one another down.

    Attributes:
        start: once: loading, on Ray in the workers as well, and the encoding of all examples;
            Ray's own start is not in it.
        training, evaluation: of a round that has it. What travels and is merged is not in them.
        total: of the run.
    """

    start: float
    training: float
    evaluation: float
    total: float


def measured(
    config: RunConfig,
    here: Resident,
    strategy: LoraStrategy,
    planned: Sequence[ClientPlan],
    pack: int,
    load: float,
) -> Timing:
    """Train the first pack of round 1 for a few steps, after one to warm up; evaluate a part."""
    members = drawn(config, strategy, 1)[:pack]
    encode = _seconds(here, lambda: [here.rows(member) for member in members])
    examples = sum(len(here.rows(member)) for member in members)
    noise = [planned[member].noise_multiplier for member in members if planned]

    def train(steps: int) -> float:
        return _seconds(here, lambda: _train(config, here, strategy, members, noise, steps))

    train(1)
    first, more = train(1), train(1 + MORE)
    step = (more - first) / MORE if more > first else more / (1 + MORE)
    groups, seen = len(here.task.group_names) or 1, list[Measured]()
    shards = max(1, here.held_out() // (config.train.evaluate_batch_size * groups))

    def evaluate() -> None:
        seen[:] = here.evaluate(0, shards, config.train).values()

    fresh, again = (_seconds(here, evaluate) for _ in range(2))
    here.load(here.first)
    return Timing(
        load=load,
        step=step,
        once=max(0.0, first - step),
        encode=encode / examples,
        evaluate=again / sum(part.examples for part in seen),
        encode_held_out=max(0.0, fresh - again),
    )


def times(
    config: RunConfig,
    strategy: LoraStrategy,
    counts: Sequence[int],
    held_out: int,
    pack: int,
    timing: Timing,
) -> Times:
    """The run's time, from what was measured and from who trains when.

    ``counts``: each client's examples.
    """
    workers, rounds = config.launch.processes(), config.rounds
    full = min(pack, len(drawn(config, strategy, 1)))

    def of_pack(members: Sequence[int]) -> float:
        steps = sum(config.train.step_count(counts[member]) for member in members)
        return timing.once * len(members) / full + timing.step * steps / full

    known = [
        in_turn(map(of_pack, packs_of(drawn(config, strategy, number), pack)), workers)
        for number in range(1, min(rounds, ROUNDS) + 1)
    ]
    training = sum(known) / len(known)
    shares = evaluating(config)
    evaluation = in_turn([timing.evaluate * held_out / shares] * shares, workers)
    encoding = timing.encode * sum(counts) * min(rounds, workers) / workers
    loads = 2 if config.launch.backend == "ray" else 1
    start = timing.load * loads + encoding + timing.encode_held_out
    evaluations = len({*range(0, rounds, config.evaluate.held_out_every), rounds})
    total = start + training * rounds + evaluation * evaluations
    return Times(start, training, evaluation, total)


def _train(
    config: RunConfig,
    here: Resident,
    strategy: LoraStrategy,
    members: Sequence[int],
    noise: Sequence[float],
    steps: int,
) -> None:
    """Train these clients together, or the only one alone, for so many steps."""
    train = config.train.model_copy(update={"steps": steps, "epochs": 0})
    client = config.client().model_copy(update={"train": train})
    factors, first, alone = strategy.plan(1).train, members[0], len(members) == 1
    if config.privacy.unit != "example":
        if alone:
            here.train(first, 1, train, factors)
        else:
            train_pack(here, members, 1, train, factors)
    elif alone:
        here.train_privately(first, 1, client, factors, noise[0], RELEASE)
    else:
        releases = [RELEASE] * len(members)
        train_private_pack(here, members, 1, client, factors, noise, releases)


def _seconds(here: Resident, work: Callable[[], object]) -> float:
    """How long it takes, on the GPU too."""
    started = time.perf_counter()
    work()
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
    return time.perf_counter() - started
