"""Asynchronous clients, event by event: who begins when, from which adapter, and who is back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import FedloraError
from strategies.sampling import choose
from strategies.world import FATES, Task, World

LOST = 1000  # tasks lost, for each client at work, before a buffer is given up


@dataclass(frozen=True)
class Flight:
    """What goes on between two merges.

    Attributes:
        now: virtual seconds.
        begun: tasks so far.
        flying: tasks that have not ended, in the order in which they began.
        waiting: tasks whose updates are in the buffer, by time and client.
    """

    now: float = 0.0
    begun: int = 0
    flying: tuple[Task, ...] = ()
    waiting: tuple[Task, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, which a snapshot can hold."""
        tasks = (*self.waiting, *self.flying)
        whole = [[t.client, t.number, t.version, FATES.index(t.fate)] for t in tasks]
        return {
            "now": torch.tensor(self.now, dtype=torch.float64),
            "begun": torch.tensor([self.begun, len(self.waiting)]),
            "tasks": torch.tensor(whole, dtype=torch.int64).reshape(-1, 4),
            "times": torch.tensor([[t.began, t.ends] for t in tasks], dtype=torch.float64).reshape(
                -1, 2
            ),
        }

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Flight:
        """What ``tensors`` has made; the beginning of a run if there is nothing."""
        if "tasks" not in tensors:
            return Flight()
        tasks = [
            Task(client, began, ends, FATES[fate], number, version)
            for (client, number, version, fate), (began, ends) in zip(
                tensors["tasks"].tolist(), tensors["times"].tolist(), strict=True
            )
        ]
        begun, waiting = tensors["begun"].tolist()
        now = float(tensors["now"])
        return Flight(now, begun, tuple(tasks[waiting:]), tuple(tasks[:waiting]))


@dataclass(frozen=True)
class Filled:
    """A buffer that is full.

    Attributes:
        batch: its K tasks, by time and client.
        lost: tasks that ended without a reply meanwhile.
        begun: how many began meanwhile.
        flight: what goes on.
    """

    batch: tuple[Task, ...]
    lost: tuple[Task, ...]
    begun: int
    flight: Flight


def fill(
    world: World,
    before: Flight,
    nodes: Sequence[int],
    version: int,
    at_once: int,
    bytes_down: float,
    bytes_up: float,
) -> Filled:
    """Let virtual time go by until ``world.clock.buffer`` updates are there.

    At each moment, first those that end are taken, in the order of clients, then, unless the
    buffer is full, free places are given to clients drawn from those that are there. A client
    begins from the newest adapter, and not again while it is at work or its update waits to be
    merged: so no buffer has two of one client.

    Args:
        world: how long tasks take, and what becomes of them.
        before: what goes on.
        nodes: all that may be asked.
        version: of the newest adapter, how many merges led to it.
        at_once: places, how many clients are at work.
        bytes_down: of one task.
        bytes_up: of one task.

    Raises:
        FedloraError: so many tasks are lost that the buffer may never be full.
    """
    now, begun, size = before.now, before.begun, world.clock.buffer
    flying, waiting, lost = list(before.flying), list(before.waiting), list[Task]()
    while len(waiting) < size:
        busy = {task.client for task in (*flying, *waiting)}
        free = [node for node in nodes if node not in busy]
        there = world.there(free, now)
        names = (version + 1,) if begun == before.begun else (version + 1, begun)
        count = min(at_once - len(flying), len(there))
        for client in choose(there, count, world.seed, *names) if count > 0 else []:
            task = world.task(client, now, bytes_down, bytes_up, begun)
            flying.append(Task(client, now, task.ends, task.fate, begun, version))
            begun += 1
        moments = [task.ends for task in flying]
        if len(flying) < at_once:  # the next to come may take a place
            coming = [world.window(node, now)[0] for node in free if node not in there]
            moments += coming
        if not moments or len(lost) > LOST * at_once:
            raise FedloraError(
                f"clock: {len(waiting)} updates of {size} came by {now:.6g} s of the virtual clock "
                f"and {len(lost)} were lost; allowed: a smaller clock.buffer or fewer losses"
            )
        now = min(moments)
        ended = sorted((t for t in flying if t.ends == now), key=lambda task: task.order)
        flying = [task for task in flying if task.ends != now]
        waiting += [task for task in ended if task.fate == "replies"]
        lost += [task for task in ended if task.fate != "replies"]
    flight = Flight(now, begun, tuple(flying), tuple(waiting[size:]))
    return Filled(tuple(waiting[:size]), tuple(lost), begun - before.begun, flight)
