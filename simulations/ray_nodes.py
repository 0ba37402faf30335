"""The nodes of a Ray cluster: how many workers each holds, and which gets the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ray
from ray._private import state

from fedlora.config import LaunchConfig

NEARLY = 1e-6  # of a worker, since Ray counts resources in steps of 1e-4


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's, in hexadecimal.
        name: address and host name, for people.
        room: how many workers it holds, by all that it has.
        free: how many more it holds now, as far as the head knows.
    """

    id: str
    name: str
    room: int
    free: int


def alive(launch: LaunchConfig) -> list[Node]:
    """The cluster's nodes that live, by their ids; also those without room."""
    free = state.available_resources_per_node()
    found = [
        Node(
            node["NodeID"],
            f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})",
            room(node["Resources"], launch),
            room(free.get(node["NodeID"], {}), launch),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.id)


def room(resources: Mapping[str, float], launch: LaunchConfig) -> int:
    """How many workers fit into a node's resources; a share of a GPU must lie on one GPU."""
    fits = []
    for name, each in wanted(launch).items():
        have = resources.get(name, 0.0)
        if name == "GPU" and each < 1:
            fits.append(int(have + NEARLY) * int(1 / each + NEARLY))
        else:
            fits.append(int(have / each + NEARLY))
    return min(fits)


def wanted(launch: LaunchConfig) -> dict[str, float]:
    """What each worker reserves, by Ray's names."""
    found = {"CPU": launch.cpus(), "GPU": launch.num_gpus, **launch.resources}
    return {name: each for name, each in found.items() if each > 0}


def choose(
    nodes: Iterable[Node],
    has: Callable[[Node], int],
    placement: str,
    allowed: Callable[[Node], bool],
) -> Node | None:
    """The node for one more worker; None if none has room.

    Nodes that others fill now come last, since a worker would wait there. Of the rest, ``spread``
    takes one with the fewest workers of ours, ``pack`` one with the most.

    Args:
        nodes: that live.
        has: how many workers of ours a node has.
        placement: ``spread`` or ``pack``.
        allowed: whether workers can run on a node.
    """
    able = [node for node in nodes if allowed(node) and node.room > has(node)]
    sign = 1 if placement == "spread" else -1

    def order(node: Node) -> tuple[bool, int, int, str]:
        return node.free < 1, sign * has(node), -sign * node.room, node.id

    return min(able, key=order, default=None)
