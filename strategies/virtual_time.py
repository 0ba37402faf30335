"""Rounds on a virtual clock: more clients are asked than needed, and the first that reply train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from flwr.app import Message

from fedlora.errors import wrong
from fedlora.rounds import Failure
from strategies.sampling import choose, wanted, with_spare
from strategies.world import Task

if TYPE_CHECKING:
    from strategies.base import LoraStrategy

NOW = "now"  # the clock's entry in ``Asking.clock``


def time_of(strategy: LoraStrategy) -> float | None:
    """The virtual seconds that have gone by; None without a virtual clock."""
    if strategy.world is None:
        return None
    return float(strategy.clock[NOW]) if NOW in strategy.clock else 0.0


def ask(strategy: LoraStrategy, nodes: list[int], server_round: int) -> list[int]:
    """The nodes that a round asks: a share of all, drawn from those that are there.

    While fewer than ``min_train_nodes`` are there, virtual time goes by. ``over_select`` times as
    many are asked as are needed, as far as there are so many.

    Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019,
    arXiv 1902.01046, ask for 1.3 times as many.
    """
    least, world = strategy.min_train_nodes, strategy.world
    needed = strategy.trace.wanted = wanted(len(nodes), strategy.fraction_train, least)
    if world is None:
        return choose(nodes, needed, strategy.seed, server_round)
    now, there = world.gathered(nodes, time_of(strategy) or 0.0, max(least, 1))
    set_time(strategy, now)
    asked = with_spare(needed, world.clock.over_select, len(there))
    return choose(there, asked, strategy.seed, server_round)


def in_time(
    strategy: LoraStrategy, server_round: int, messages: Iterable[Message]
) -> list[Message]:
    """Those of a round's messages whose clients reply in time; the clock goes to its end.

    The round ends with the last reply that it needs, or, if so many do not come, once nobody is
    waited for any more. Who is left out is noted as a failure with the virtual reason: nothing is
    sent to it here, so it does not train and releases nothing, but what it was sent counts.
    """
    found, world, trace = list(messages), strategy.world, strategy.trace
    if world is None or not found:
        return found
    now, layout = time_of(strategy) or 0.0, strategy._layout
    assert layout is not None  # configure_train has prepared it
    plan = strategy.plan(server_round)
    up = sum(field.bytes for field in layout.select(plan.train, plan.personal))
    down = trace.bytes_down / len(found)
    tasks = [world.task(node, now, down, up, server_round, node) for node in trace.asked]
    tasks.sort(key=lambda task: task.order)
    good = [task for task in tasks if task.fate == "replies"][: trace.wanted]
    enough = len(good) == trace.wanted
    ends = (good if enough else tasks)[-1].ends
    for task in tasks:
        if task not in good:
            note_lost(strategy, task, ends)
    set_time(strategy, ends)
    counted = {task.client for task in good}
    trace.asked = {node: client for node, client in trace.asked.items() if node in counted}
    return [message for message in found if message.metadata.dst_node_id in counted]


def note_lost(strategy: LoraStrategy, task: Task, ends: float) -> None:
    """Name a client that does not count, and why; ``ends``: when nobody is waited for any more."""
    clock, trace = "on the virtual clock", strategy.trace
    if task.fate == "late" or task.ends > ends or task.fate == "replies":
        over = min(task.ends, ends) - task.began
        reason = f"late {clock}: waited for {over:.6g} s"
    else:
        reason = f"{task.fate} {clock} after {task.ends - task.began:.6g} s"
    client = strategy._clients.get(task.client, task.client)
    trace.failures.append(Failure(client, "train", reason))


def set_time(strategy: LoraStrategy, now: float) -> None:
    """Put the clock forward."""
    strategy.clock = {**strategy.clock, NOW: torch.tensor(now, dtype=torch.float64)}


def check_world(strategy: LoraStrategy) -> None:
    """Refuse what does not go together with a virtual clock.

    Raises:
        ConfigError: client-level privacy; or FedBuff, and the rule does more than average, or
            trains other factors in other rounds, or takes sums or clients of several ranks.
    """
    if strategy.world is None:
        return
    mode, rule = strategy.world.clock.mode, type(strategy).__name__
    if strategy.client_privacy:
        allowed = (
            "'none' with client-level privacy: who is there and replies in time is no sample that "
            "an accountant can price"
        )
        raise wrong("clock.mode", mode, allowed)
    if mode != "fedbuff":
        return
    reason = ""
    if not strategy.averages:
        reason = f"{rule}, which does more than average changes"
    elif strategy.plan(1) != strategy.plan(2):
        reason = f"{rule}: an update from an older round has trained another factor"
    elif strategy.sums != "server":
        reason = f"launch.sums = {strategy.sums!r}, which sees no update's age"
    elif strategy.ranks != "one":
        reason = "clients of several ranks"
    if reason:
        raise wrong("clock.mode", mode, f"'none' or 'rounds' with {reason}")
