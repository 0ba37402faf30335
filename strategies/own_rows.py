"""The stage in which every client measures on rows of its own, and what it comes to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedlora.rounds import (
    FACTORS,
    GLOBAL,
    PERSONAL,
    Failure,
    OverClients,
    OwnRows,
    ever_trained,
)
from fedlora.sums_order import Limits
from strategies.messages import asked_of, to_measure
from strategies.replies import Reply, collect

if TYPE_CHECKING:
    from strategies.base import LoraStrategy

NUMBERS = [f"{name}.{key}" for name in (GLOBAL, PERSONAL) for key in ("loss", "accuracy")]


@dataclass(frozen=True)
class Measuring:
    """When clients measure on rows of their own.

    Attributes:
        every: after each round that it divides, round 0 too; 0 after the last one alone.
        newcomers: the last so many nodes, by their ids, neither train nor share in measuring the
            task's held-out part.
    """

    every: int = 0
    newcomers: int = 0

    def due(self, server_round: int, last: int) -> bool:
        """Whether they do after this round."""
        return server_round == last or (self.every > 0 and server_round % self.every == 0)


def measure_own_rows(
    strategy: LoraStrategy,
    grid: Grid,
    server_round: int,
    last: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
) -> None:
    """Ask every client, if it is time, and note what they say in the strategy's trace.

    To fine-tune, clients may move whatever the rule trains in this round or the next.
    """
    if strategy.own_rows is None or not strategy.own_rows.due(server_round, last):
        return
    nodes, trace = sorted(grid.get_node_ids()), strategy.trace
    plans = [strategy.plan(max(server_round, 1)), strategy.plan(server_round + 1)]
    plan = replace(plans[0], train=ever_trained(plans), send=FACTORS)
    adapter = strategy.prepare(arrays).unpack(arrays)
    payload, _ = to_measure(plan, arrays, config)
    messages = strategy.addressed_to(
        "own rows", server_round, payload, asked_of(plan, adapter, config), nodes
    )
    replies = grid.send_and_receive(messages, timeout=timeout)
    key, limits = strategy.weighted_by_key, Limits(strategy.max_examples, base=trace.base)
    found = collect(replies, trace.asked, "evaluate", server_round, key, limits)
    trace.failures += found.failures
    good = []
    for reply in found.good:
        if all(math.isfinite(reply.metrics.get(name, math.nan)) for name in NUMBERS):
            good.append(reply)
        else:
            reason = f"on its own rows: {', '.join(NUMBERS)} are not four finite numbers"
            trace.failures.append(Failure(reply.client, "evaluate", reason))
    new = set(nodes[len(nodes) - strategy.own_rows.newcomers :])
    trace.own_rows = {
        **_over("", [reply for reply in good if reply.node not in new]),
        **_over("new ", [reply for reply in good if reply.node in new]),
    }


def over_clients(values: Sequence[float], highest_is_worst: bool) -> OverClients:
    """Mean, worst tenth and spread of at least one number."""
    ordered = sorted(values, reverse=highest_is_worst)
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return OverClients(statistics.fmean(values), statistics.fmean(worst), statistics.pstdev(values))


def _over(prefix: str, replies: Sequence[Reply]) -> dict[str, OwnRows]:
    """What these replies say, by what was measured; nothing without any."""
    if not replies:
        return {}

    def over(name: str, key: str) -> OverClients:
        values = [reply.metrics[f"{name}.{key}"] for reply in replies]
        return over_clients(values, highest_is_worst=key == "loss")

    return {
        prefix + name: OwnRows(len(replies), over(name, "loss"), over(name, "accuracy"))
        for name in (GLOBAL, PERSONAL)
    }
