"""Which nodes take part in a round: waited for, then drawn from the seed."""

from __future__ import annotations

import math
import time
from logging import INFO, WARNING

from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.errors import FedloraError
from fedlora.seeds import numpy_generator

NEARLY = 1e-9  # by which 100 * 1.1 lies above 110, and more


def wait_for_nodes(grid: Grid, least: int, settle: float, timeout: float) -> list[int]:
    """All connected nodes in ascending order, once there are ``least`` and no more come.

    Args:
        grid: asked for its nodes every 0.1 s.
        least: nodes needed.
        settle: seconds without a change that count as "no more come".
        timeout: seconds to wait for ``least`` nodes.

    Raises:
        FedloraError: too few nodes connected in time.
    """
    started = changed = time.monotonic()
    nodes = sorted(grid.get_node_ids())
    while len(nodes) < least or time.monotonic() - changed < settle:
        waited = time.monotonic() - started
        if len(nodes) < least and waited >= timeout:
            raise FedloraError(
                f"{len(nodes)} nodes connected after {waited:.0f} s, {least} needed "
                "(min_available_nodes); start more nodes or ask for fewer"
            )
        time.sleep(0.1)
        now = sorted(grid.get_node_ids())
        if now != nodes:
            nodes, changed = now, time.monotonic()
            log(WARNING if len(nodes) < least else INFO, "%d nodes connected", len(nodes))
    return nodes


def wanted(number: int, fraction: float, least: int) -> int:
    """How many of so many nodes a round needs."""
    return max(int(number * fraction), least)


def with_spare(needed: int, over_select: float, there: int) -> int:
    """How many of those who are there are asked, so many times the number that is needed."""
    return min(math.ceil(needed * over_select - NEARLY), there)


def draw(nodes: list[int], fraction: float, least: int, seed: int, server_round: int) -> list[int]:
    """A share of the nodes, at least ``least``, without replacement, in ascending order."""
    return choose(nodes, wanted(len(nodes), fraction, least), seed, server_round)


def choose(nodes: list[int], count: int, seed: int, *names: int) -> list[int]:
    """So many of the nodes, without replacement, in ascending order; ``names`` are of the draw."""
    rng = numpy_generator(seed, "sample", *names)
    return [nodes[index] for index in sorted(rng.choice(len(nodes), size=count, replace=False))]
