"""A recipe's virtual clock: what goes with it, and the clients that it times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from fedlora.config import RunConfig
from fedlora.errors import wrong
from fedlora.ranks import ranks_of
from simulations.grid import LocalGrid
from strategies import LoraStrategy
from strategies.virtual_time import check_world
from strategies.world import World


def check_clock(config: RunConfig, rule: LoraStrategy) -> None:
    """Refuse a clock that does not go with the rest of a recipe.

    Raises:
        ConfigError: see ``check_world``, or a buffer that would never be full or never merged.
    """
    clock, clients = config.clock, config.clients
    if clock.mode == "none":
        return
    if config.privacy.unit == "client":
        allowed = (
            "'none' with privacy.unit = 'client': who is there and replies in time is no sample "
            "that an accountant can price"
        )
        raise wrong("clock.mode", clock.mode, allowed)
    made = replace(rule, sums=config.launch.sums, ranks=ranks_of(config.adapter))
    check_world(clocked(made, config, []))
    if clock.mode == "fedbuff" and not clients.min_train_nodes <= clock.buffer <= clients.training:
        allowed = (
            f"from {clients.min_train_nodes} (clients.min_train_nodes) to {clients.training}, "
            "the clients that train"
        )
        raise wrong("clock.buffer", clock.buffer, allowed)


def check_runtime(config: RunConfig, grid: Grid) -> None:
    """Refuse what needs clients to be known by their nodes, where they are not.

    Raises:
        ConfigError: newcomers or a virtual clock on Flower's own runtime.
    """
    if isinstance(grid, LocalGrid):
        return
    runtime = "on Flower's own runtime, where no node says which client it is"
    if config.clients.newcomers:
        raise wrong("clients.newcomers", config.clients.newcomers, f"0 {runtime}")
    if config.clock.mode != "none":
        raise wrong("clock.mode", config.clock.mode, f"'none' {runtime}")


def clocked(strategy: LoraStrategy, config: RunConfig, counts: Sequence[int]) -> LoraStrategy:
    """The strategy with its clients on the clock, where the recipe asks for one.

    ``counts``: each client's examples.
    """
    if config.clock.mode == "none":
        return strategy
    train = config.train
    work = {
        client: float(train.step_count(count) * min(train.batch_size, count))
        for client, count in enumerate(counts)
    }
    return replace(strategy, world=World(config.clock, config.seed, work))
