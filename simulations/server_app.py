"""The Flower ``ServerApp``: one run from its recipe to its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from clients.resident import Resident, resident
from fedlora.base_change import widened
from fedlora.calibration import ClientPlan
from fedlora.config import ClientConfig, RunConfig
from fedlora.disk import whole_folder
from fedlora.errors import FedloraError
from fedlora.faults import check_armed, reach
from fedlora.ledger import Ledger
from fedlora.lowrank import Adapter
from fedlora.ranks import ranks_of
from fedlora.rounds import RoundRecord
from fedlora.wire import Layout
from simulations import recipe
from simulations.census import census
from simulations.clock import check_runtime, clocked
from simulations.deploy.telling import Told
from simulations.figures import curves
from simulations.grid import LocalGrid
from simulations.packing import clients_together
from simulations.personal_adapters import save_personal
from simulations.profiling import profiled
from simulations.progress import Progress
from simulations.protection import plan_privacy, protected
from simulations.results import claim, default_folder
from simulations.resuming import Resumable, alone, contexts, finished, same_run_in
from simulations.run_config import from_run_config
from simulations.run_folders import read_run
from simulations.statement import ledger_folder, statement
from simulations.tracking.tracking import Tracking, chosen
from simulations.virtual_time import virtual_time
from strategies import METHODS, LoraStrategy
from strategies.own_rows import Measuring
from strategies.snapshot import Snapshot

NODE_TIMEOUT = 600.0  # seconds to wait for nodes that are not connected
LEAVING = 30.0  # seconds for a server app whose SuperLink died to let go of its run
EVALUATORS = 16  # clients that share the measuring of a round
PROMISE = ("unit", "relation", "sampling", "epsilon", "delta", "planned", "accountant", "claim")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config describes; see ``run_config.from_run_config``.

    ``folder`` in the run config says where results go; empty takes the default. With ``resume``
    the run that it holds is gone on with. ``tell`` puts ``rounds`` into the log for who submitted
    the run, or the ``files`` as well; ``wait`` is how many seconds to wait for nodes.
    """
    check_armed()
    config = from_run_config(context.run_config)
    named, told = (str(context.run_config.get(key, "")) for key in ("folder", "tell"))
    folder, resume = Path(named or default_folder(config.name)), context.run_config.get("resume")
    wait = float(cast(float, context.run_config.get("wait", 0.0))) or NODE_TIMEOUT
    progress: Progress = Told() if told else getattr(grid, "progress", Progress())
    try:
        if resume:
            same_run_in(folder, config)
        else:
            claim(folder)
        with alone(folder, LEAVING if told else 0.0):
            if resume and finished(folder):
                progress.note(f"{folder}: finished already")
            else:
                serve(config, grid, folder, bool(resume), progress, wait)
            if told == "files":
                Told().send(folder)
    except FedloraError as error:
        if told:
            Told().refused(error)
        raise


def serve(
    config: RunConfig,
    grid: Grid,
    folder: Path,
    resume: bool = False,
    listener: Progress | None = None,
    node_timeout: float = NODE_TIMEOUT,
) -> None:
    """Run the federation on a grid and leave its results in ``folder``, or ``resume`` it there.

    ``listener`` is the grid's if it is left out; ``node_timeout`` are seconds to wait for nodes.
    """
    progress: Progress = getattr(grid, "progress", Progress()) if listener is None else listener
    check_runtime(config, grid)
    chosen(config.launch.track)
    with threads(config.launch.threads):
        here = resident(server_view(config))
        ledger, initial = Ledger(ledger_folder(config, folder)), ArrayRecord(here.first)
        strategy = strategy_for(config, here.model.scales(), node_timeout)
        known = census(config, here, grid)
        planned = plan_privacy(config, here, strategy, known.counts)
        strategy = protected(strategy, config, planned, ledger)
        strategy = clocked(strategy, config, known.counts)
        layout = strategy.prepare(initial)  # a mistake is found before anything is written
        pack = clients_together(config, here, strategy)[0] if isinstance(grid, LocalGrid) else 1
        tell = progress.note if resume else None
        kept = Resumable(folder, config, here.fingerprint, ledger, tell)
        progress.saving_to(folder)
        progress.run_started(f"{config.method}, seed {config.seed}", config.rounds)

        def on_round(record: RoundRecord, arrays: ArrayRecord) -> None:
            kept.results.add(record)
            tracking.add(record)  # what dies before it is committed is done and told again
            kept.add(Snapshot.of(strategy, record.round, arrays), grid)
            progress.round_done(record)

        tracking = Tracking(config, kept.results, progress.note)
        with profiled(grid, strategy, kept.results), tracking:
            result = strategy.start(
                grid,
                initial,
                num_rounds=config.rounds,
                timeout=config.clients.timeout,
                train_config=client_config(config, here, planned, ledger, pack),
                evaluate_config=client_config(config, here, [], ledger),
                evaluate_first=True,
                on_round=on_round,
                resume=kept.restore(grid),
            )
        here.load(result.arrays.to_torch_state_dict(), base=strategy.base_record())
        success = here.backdoor_success(config.train)
        save(here, strategy, layout, result.arrays, folder / "adapter")
        if config.privacy.unit != "client":  # there no noise covers what clients keep
            save_personal(contexts(grid), folder)
    reach("finish")
    private = statement(config, planned, ledger, known) if planned else {}
    if private:
        kept.results.write("privacy.json", private)
    curves([read_run(folder)], folder / "curves.png")
    virtual_time([read_run(folder)], folder / "virtual_time.png")
    kept.finish(
        {
            "task": config.task.name,
            "model": config.model.name,
            "base_fingerprint": here.fingerprint,
            "trained_numbers": sum(value.numel() for value in here.first.values()),
            "learning_rate": config.train.learning_rate,
            "pack": pack,
            **({"backdoor_success": success} if success is not None else {}),
            **({"privacy": {key: private[key] for key in PROMISE}} if private else {}),
        }
    )
    progress.run_done()


def save(
    here: Resident, strategy: LoraStrategy, layout: Layout, arrays: ArrayRecord, folder: Path
) -> None:
    """Write the adapter that was loaded for PEFT, with what was added to the base in its factors.

    Raises:
        FedloraError: it cannot be written.
    """
    whole = widened(layout.unpack(arrays), strategy.memory) if strategy.changes_base else Adapter()
    with whole_folder(folder) as made:
        here.model.save(made, whole.pairs)


def client_config(
    config: RunConfig, here: Resident, planned: list[ClientPlan], ledger: Ledger, pack: int = 1
) -> ConfigRecord:
    """What clients are told in every message: with ``planned``, also their noise and ledger.

    ``pack`` is for the grid: how many of them may be trained together.

    Where whole clients are protected, they are told of neither: both are the server's.
    """
    record = ConfigRecord({"fedlora": config.client().model_dump_json(), "base": here.fingerprint})
    if pack > 1:
        record["pack"] = pack
    if planned and config.privacy.unit == "example":
        record["noise-multipliers"] = [client.noise_multiplier for client in planned]
        record["ledger"] = str(ledger.folder)
    return record


def strategy_for(
    config: RunConfig, scales: Mapping[str, float], node_timeout: float = NODE_TIMEOUT
) -> LoraStrategy:
    """The run's method, with Flower's options as the recipe gives them.

    ``scales``: see ``AdaptedModel.scales``; ``node_timeout``: seconds to wait for nodes.
    """
    kind = METHODS[config.method]
    options = recipe.method_options(config)
    if "send_frozen" in {field.name for field in fields(kind)}:
        options.setdefault("send_frozen", False)  # our clients draw it from the seed
    number, measures = config.clients.number, config.evaluate
    evaluators = evaluating(config)
    return kind(
        **options,
        seed=config.seed,
        fraction_train=config.clients.fraction_train,
        min_train_nodes=config.clients.min_train_nodes,
        fraction_evaluate=evaluators / (number + 1),
        min_evaluate_nodes=evaluators,
        min_available_nodes=number,
        settle=0.0,
        node_timeout=node_timeout,
        scales=scales,
        ranks=ranks_of(config.adapter),
        sums=config.launch.sums,
        secure=config.secure,
        evaluate_every=measures.held_out_every,
        own_rows=Measuring(measures.every, config.clients.newcomers) if measures.personal else None,
    )


def evaluating(config: RunConfig) -> int:
    """How many clients measure the held-out rows: all where these are theirs, or their groups'."""
    own = config.clients.split == "own" or config.evaluate.rows == "own_groups"
    return config.clients.training if own else min(config.clients.training, EVALUATORS)


def server_view(config: RunConfig) -> ClientConfig:
    """The configuration under which the server holds the model: on the CPU beside Ray workers."""
    client = config.client()
    if config.launch.backend == "inprocess":
        return client
    return client.model_copy(update={"device": "cpu"})


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads, since the order of sums may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
