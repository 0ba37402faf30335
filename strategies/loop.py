"""The rounds of a run, one after the other: Flower's loop, with a record of each round."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import INFO
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedlora.faults import begin, reach
from fedlora.rounds import RoundRecord
from strategies.fedbuff import fedbuff_round
from strategies.masked_round import masked_round
from strategies.own_rows import measure_own_rows
from strategies.record import Trace
from strategies.virtual_time import check_world, in_time, time_of

if TYPE_CHECKING:
    from strategies.base import LoraStrategy


def run_rounds(
    strategy: LoraStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    evaluate_first: bool,
    on_round: Callable[[RoundRecord, ArrayRecord], None],
    first: int = 0,
) -> Result:
    """What ``LoraStrategy.start`` does once it is prepared; see there for the arguments.

    ``first``: the round to begin with; 0 measures before any training.
    """
    check_world(strategy)
    result = Result(arrays=arrays)
    for server_round in range(first, num_rounds + 1):
        begin(server_round)
        started = time.monotonic()
        strategy.trace = Trace()
        trained = evaluated = central = None
        if server_round:
            config = ConfigRecord(dict(train_config))
            train = _way(strategy)
            merged, trained = train(strategy, grid, server_round, arrays, config, timeout)
            arrays = result.arrays = merged or arrays
        strategy.trace.virtual_seconds = time_of(strategy)
        if trained is not None:
            result.train_metrics_clientapp[server_round] = trained
        due = server_round % strategy.evaluate_every == 0 or server_round == num_rounds
        if due and (server_round or evaluate_first):
            config = ConfigRecord(dict(evaluate_config))
            messages = strategy.configure_evaluate(server_round, arrays, config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            evaluated = strategy.aggregate_evaluate(server_round, replies)
        if evaluated is not None:
            result.evaluate_metrics_clientapp[server_round] = evaluated
        if evaluate_fn and (central := evaluate_fn(server_round, arrays)) is not None:
            result.evaluate_metrics_serverapp[server_round] = central
        if server_round or evaluate_first:
            measure_own_rows(
                strategy, grid, server_round, num_rounds, arrays, evaluate_config, timeout
            )
        seconds = time.monotonic() - started
        record = strategy.trace.record(server_round, trained, central or evaluated, seconds)
        log(INFO, "[ROUND %s/%s] %s", server_round, num_rounds, record)
        on_round(record, arrays)
    return result


def _round(
    strategy: LoraStrategy,
    grid: Grid,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Ask, wait and merge; ``(None, None)`` keeps the adapter."""
    messages = strategy.configure_train(server_round, arrays, config, grid)
    messages = in_time(strategy, server_round, messages)
    reach("dispatch")
    replies = grid.send_and_receive(messages, timeout=timeout)
    reach("received")
    return strategy.aggregate_train(server_round, replies)


def _way(strategy: LoraStrategy) -> Callable[..., tuple[ArrayRecord | None, MetricRecord | None]]:
    """How updates come together: by FedBuff, as masked sums, or one by one."""
    if strategy.world is not None and strategy.world.clock.mode == "fedbuff":
        return fedbuff_round
    return masked_round if strategy.sums == "masked" else _round
