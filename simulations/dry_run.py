"""What a run would take, before it starts: ``fedlora run --dry-run``.

The recipe is checked whole, task and model are loaded, a few steps and a part of an evaluation are
measured. Nothing is written, no ledger is charged, and nothing that was trained is kept. Of a model
or data that is not on this machine, it tells what shapes tell, and what the recipe declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord

from clients.resident import Resident
from clients.stacked import PackError, owners
from fedlora.adapters import AdaptedModel, attach
from fedlora.calibration import ClientPlan
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, MissingDataError
from fedlora.models import load_model, model_without_weights
from fedlora.partition import deal, hold_back, partition
from fedlora.partitioners import Rows
from fedlora.tasks.declared import Declared, declared
from fedlora.tasks.task import Task
from fedlora.wire import Layout
from simulations.census import counts_of
from simulations.forecast import Spread, Traffic, total_steps, traffic
from simulations.memory import Memory, Peak, by_formula
from simulations.packing import clients_together, suited
from simulations.protection import plan_privacy, protected
from simulations.server_app import strategy_for, threads
from simulations.statement import plan_run
from simulations.timing import Times, Timing, measured, times
from strategies import LoraStrategy


@dataclass(frozen=True)
class Noise:
    """The plan of a private run.

    Attributes:
        unit: ``example`` or ``client``.
        noise_multiplier: over the clients.
        epsilon: what all rounds cost at ``delta`` where they cost most.
    """

    unit: str
    noise_multiplier: Spread
    epsilon: float
    delta: float


@dataclass(frozen=True)
class DryRun:
    """What a run would take.

    Attributes:
        base_numbers: of the frozen model.
        trained_numbers: that one client, of the largest rank, trains in round 1.
        ranks: of the clients in turn; none where all have one.
        examples: of a client.
        steps: of a client in a round.
        total_steps: of all clients in all rounds, on average where clients are drawn by chance.
        pack, pack_because: clients that are trained together, and why so many.
        timing, times: None where the weights or the data could not be had.
        missing: why they could not.
        declared: what the recipe says of data that could not be had; else None.
    """

    name: str
    method: str
    model: str
    base_numbers: int
    trained_numbers: int
    ranks: tuple[int, ...]
    clients: int
    rounds: int
    examples: Spread
    steps: Spread
    total_steps: float
    pack: int
    pack_because: str
    workers: int
    traffic: Traffic
    memory: Memory
    timing: Timing | None
    times: Times | None
    privacy: Noise | None
    missing: str | None
    declared: Declared | None


def dry_run(config: RunConfig) -> DryRun:
    """Measure what this recipe needs and work out the rest.

    Raises:
        FedloraError: the run could not be carried out either.
    """
    with threads(config.launch.threads):
        peak = Peak(private=config.privacy.unit == "example")
        try:
            here = Resident(config.client())
        except ConfigError as error:
            return _from_shapes(config, error)
        load = peak.seconds()
        strategy = strategy_for(config, here.model.scales())
        counts = counts_of(config, here)
        planned = plan_privacy(config, here, strategy, counts)
        strategy = protected(strategy, config, planned, None)
        layout = strategy.prepare(ArrayRecord(here.first))
        pack = clients_together(config, here, strategy)
        timing = measured(config, here, strategy, planned, pack[0], load)
        memory = peak.found(config.launch.processes(), here.device.type == "cuda")
    found = times(config, strategy, counts, here.held_out(), pack[0], timing)
    return _told(
        config, here.model, strategy, layout, planned, counts, pack, memory, (timing, found)
    )


def _from_shapes(config: RunConfig, missing: ConfigError) -> DryRun:
    """As much as can be said without the model's weights, and of data as the recipe declares it.

    Raises:
        ConfigError: ``missing``, where shapes or sizes cannot be had either; or what else is
            missing.
    """
    task, parts, said = _dealt(config)
    if config.model.options or (said is None and _loads(config, task)):
        raise missing
    if config.evaluate.personal:
        parts, _ = hold_back(parts, config.evaluate.holdout, config.seed)
    counts = [len(part) for part in parts]
    base = model_without_weights(config.model, len(task.label_names), task.objective)
    if base is None:
        raise missing
    model = attach(base, config.adapter, config.seed)
    strategy = strategy_for(config, model.scales())
    planned = plan_run(config, counts) if config.privacy.unit != "none" else []
    strategy = protected(strategy, config, planned, None)
    zeros = {key: torch.zeros(p.shape, dtype=p.dtype) for key, p in model.trained.items()}
    layout = strategy.prepare(ArrayRecord(zeros))
    moving = {
        field.key: model.trained[field.key] for field in layout.select(strategy.plan(1).train)
    }
    try:
        owners(model.module, moving)
        pack = suited(config, moving, "cpu", model.fixed())
    except PackError as error:
        pack = 1, str(error)
    memory = by_formula(config, base.module, moving, pack[0], said.picture_bytes if said else 0)
    told = _told(config, model, strategy, layout, planned, counts, pack, memory, None, str(missing))
    return replace(told, declared=said)


def _dealt(config: RunConfig) -> tuple[Task, tuple[Rows, ...], Declared | None]:
    """The task and what each client has of it; and what was declared, where it is not here."""
    try:
        return *deal(config.task, config.clients, config.seed), None
    except MissingDataError:
        if (found := declared(config.task)) is None:
            raise
    task, said = found
    return task, partition(task, config.clients, config.seed), said


def _loads(config: RunConfig, task: Task) -> bool:
    """Whether the model is no part of what is missing."""
    try:
        load_model(config.model, len(task.label_names), task.objective)
    except ConfigError:
        return False
    return True


def _told(
    config: RunConfig,
    model: AdaptedModel,
    strategy: LoraStrategy,
    layout: Layout,
    planned: Sequence[ClientPlan],
    counts: Sequence[int],
    pack: tuple[int, str],
    memory: Memory,
    timed: tuple[Timing, Times] | None,
    missing: str | None = None,
) -> DryRun:
    """All of it in one place."""
    trained = layout.select(strategy.plan(1).train)
    everything = sum(p.numel() for p in model.module.parameters())
    noise = None
    if planned:
        noise = Noise(
            unit=config.privacy.unit,
            noise_multiplier=Spread.of(client.noise_multiplier for client in planned),
            epsilon=max(client.epsilon for client in planned),
            delta=config.privacy.delta,
        )
    return DryRun(
        name=config.name,
        method=config.method,
        model=config.model.name,
        base_numbers=everything - sum(p.numel() for p in model.trained.values()),
        trained_numbers=sum(torch.Size(field.shape).numel() for field in trained),
        ranks=config.adapter.ranks,
        clients=config.clients.number,
        rounds=config.rounds,
        examples=Spread.of(counts),
        steps=Spread.of(config.train.step_count(count) for count in counts),
        total_steps=total_steps(config, strategy, counts),
        pack=pack[0],
        pack_because=pack[1],
        workers=config.launch.processes(),
        traffic=traffic(config, strategy, layout),
        memory=memory,
        timing=timed[0] if timed else None,
        times=timed[1] if timed else None,
        privacy=noise,
        missing=missing,
        declared=None,
    )
