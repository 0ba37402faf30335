"""Runs on this machine or a Ray cluster: a grid, the server app, a folder of results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, RecordDict

from clients.client_app import app as client_app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid, LocalGrid
from simulations.profiling import Profiler
from simulations.progress import Progress
from simulations.recipe import Recipe
from simulations.results import claim, default_folder
from simulations.resuming import State, state_of
from simulations.server_app import app as server_app
from simulations.tracking.tracking import chosen

CLIENT_APP = "clients.client_app:app"


def run(
    config: RunConfig,
    out: Path | None,
    progress: Progress,
    profile: bool = False,
    resume: bool = False,
) -> Path:
    """One run; returns its folder, with ``profile`` also of where its time went.

    With ``resume``, the run that ``out`` holds is gone on with.

    Raises:
        FedloraError: the run cannot be carried out as written.
    """
    started = time.perf_counter()
    folder = out or default_folder(config.name)
    if not resume:
        claim(folder)
    with open_grid(config, progress) as grid:
        grid.profiler = Profiler(started) if profile else None
        serve_on(grid, config, folder, resume)
    return folder


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    out: Path | None,
    progress: Progress,
    profile: bool = False,
    resume: bool = False,
) -> Path:
    """Every method with every seed on one pool of workers; returns the folder of run folders.

    With ``resume``, the runs in ``out`` that are finished stay, and the others are gone on with.

    Raises:
        FedloraError: a run cannot be carried out; all are checked before the first starts.
    """
    runs: dict[str, RunConfig] = {}
    for seed in seeds:
        for method in methods:
            runs[f"{method}-seed{seed}"] = recipe.resolve(method, [*overrides, f"seed={seed}"])
    first = next(iter(runs.values()))
    for name, config in runs.items():
        if (config.launch, config.clients.number) != (first.launch, first.clients.number):
            raise ConfigError(
                f"methods: {name} wants another [launch] or clients.number than the first; "
                "methods that are compared run on one pool of workers"
            )
    folder = out or default_folder(f"{first.name}-compare")
    states: dict[str, State] = {}
    if resume and not folder.is_dir():
        raise ConfigError(f"--resume: found no folder {str(folder)!r}")
    if resume:
        states = {name: state_of(folder / name, config) for name, config in runs.items()}
    else:
        claim(folder)
    with open_grid(first, progress) as grid:
        for name, config in runs.items():
            if states.get(name) == "finished":
                progress.note(f"{folder / name}: finished already")
                continue
            grid.profiler = Profiler(time.perf_counter()) if profile else None
            serve_on(grid, config, folder / name, states.get(name) == "begun")
    return folder


@contextmanager
def open_grid(config: RunConfig, progress: Progress) -> Iterator[LocalGrid]:
    """The grid a recipe asks for, closed at the end.

    Raises:
        ConfigError: the recipe asks for what is not here.
    """
    chosen(config.launch.track)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    grid: LocalGrid
    if config.launch.backend == "ray":
        from simulations.ray_grid import RayGrid  # Ray takes seconds to import

        number, needs = config.clients.number, config.client()
        grid = RayGrid(CLIENT_APP, number, config.launch, progress=progress, needs=needs)
    else:
        grid = InProcessGrid(client_app, config.clients.number, progress=progress)
    try:
        yield grid
    finally:
        grid.close()


def serve_on(grid: LocalGrid, config: RunConfig, folder: Path, resume: bool = False) -> None:
    """Hand one run to the server app, as Flower's runtime would."""
    grid.forget()
    context = Context(
        run_id=RUN_ID,
        node_id=SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config={"config": config.model_dump_json(), "folder": str(folder), "resume": resume},
    )
    server_app(grid, context)
