"""Running a recipe on a deployment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import FedloraError, wrong
from simulations.deploy.bundle import bundle
from simulations.deploy.checks import connect, missing_nodes
from simulations.deploy.connecting import is_here
from simulations.deploy.control import Control, UnansweredError, control
from simulations.deploy.layout import Place
from simulations.deploy.telling import Listener
from simulations.progress import Progress
from simulations.results import claim, default_folder
from simulations.resuming import config_of

ATTEMPTS = 3  # at a run that Flower loses: a message that it could not store, a task that expired
Value = str | int | float | bool


def submit(
    place: Place,
    config: RunConfig,
    out: Path | None,
    progress: Progress,
    wait: float,
    resume: Path | None = None,
) -> Path:
    """Run a recipe on the deployment's nodes; returns the run's folder on this machine.

    Args:
        place: the deployment.
        config: the run; ``launch`` says nothing of nodes, but for ``threads`` and ``device``.
        out: a new folder; None takes the default.
        progress: told of rounds as they end.
        wait: seconds to wait for nodes that are not connected, before the run and in it.
        resume: go on with the run in this folder, which is on the SuperLink's machine.

    Raises:
        FedloraError: something is wrong with the deployment, or with the run.
    """
    check_number(config, place)
    reached, connection = connect(place)
    if not reached:
        raise FedloraError(connection.detail)
    here = is_here(place.deployment.host)
    folder = out or default_folder(config.name)
    if resume is not None and here:
        config_of(resume, None, None, [])
        folder = resume
    else:
        claim(folder)
    there = str(folder.resolve()) if here else str(resume or Path("runs") / folder.name)
    _await_nodes(place, wait)
    run_config: dict[str, Value] = {
        "config": config.model_dump_json(),
        "folder": there,
        "resume": resume is not None,
        "tell": "rounds" if here else "files",
        "wait": max(wait, 1.0),
    }
    with control(place) as asked:
        if resume is not None:
            for left in asked.unfinished(there):
                asked.stop(left)
        if here:
            progress.saving_to(folder)
        listener = carry_through(asked, run_config, progress, None if here else folder)
    if not (folder / "summary.json").is_file() or not (here or listener.sent):
        found = f"found not all results, {listener.place} has them"
        raise FedloraError(f"{folder}: {found}; copy that folder from the SuperLink's machine")
    return folder


def check_number(config: RunConfig, place: Place) -> None:
    """Refuse a run for another number of clients than there are nodes.

    Raises:
        ConfigError: it is.
    """
    if config.clients.number != place.deployment.nodes:
        allowed = f"{place.deployment.nodes}, the nodes of the deployment"
        raise wrong("clients.number", config.clients.number, allowed)


def _await_nodes(place: Place, seconds: float) -> None:
    """Wait for all nodes, so long at most."""
    ends = time.monotonic() + seconds
    while missing := missing_nodes(place):
        if time.monotonic() >= ends:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise FedloraError(f"{missing[0]}{more}; waited {seconds:g} s (--wait)")
        time.sleep(0.5)


def carry_through(
    asked: Control, run_config: Mapping[str, Value], progress: Progress, into: Path | None
) -> Listener:
    """Submit a run, listen until it has ended, and again where Flower lost it on the way.

    A server app that ended over an error of ours is not submitted again. ``into`` takes the files.

    Raises:
        FedloraError: it did not complete.
    """
    fab = bundle()
    for attempt in range(1, ATTEMPTS + 1):
        listener = Listener(progress, into)
        run = asked.start(fab, run_config)
        ended, said = _follow(asked, run, listener, str(run_config["folder"]))
        if ended == "completed":
            break
        reason = listener.refused or f"{ended or 'lost'}: {said}"
        begun = listener.place or run_config["resume"]
        if listener.refused or ended == "stopped" or not begun or attempt == ATTEMPTS:
            raise FedloraError(f"run {run}: {reason}")
        progress.note(f"run {run}: {' '.join(reason.split())}; submitted again")
        run_config = {**run_config, "resume": True}
    return listener


def _follow(asked: Control, run: int, listener: Listener, there: str) -> tuple[str, str]:
    """Listen to a run until it ends, and how it did; a person who leaves ends it."""
    try:
        for text in asked.logs(run):
            listener.hear(text)
        return asked.outcome(run)
    except KeyboardInterrupt:
        asked.stop(run)
        raise
    except UnansweredError as error:
        again = f"go on with: fedlora deploy run DIR RECIPE --resume {there}"
        raise FedloraError(f"{error}; start it again (superlink/start), and {again}") from None
