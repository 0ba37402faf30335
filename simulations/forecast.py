"""What a run will send and do, as far as its recipe, its data and its shapes decide."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedlora.base_change import numbers
from fedlora.config import RunConfig
from fedlora.fixed_point import FixedPoint
from fedlora.ranks import narrowed
from fedlora.rounds import FACTORS
from fedlora.wire import FLOATS, Layout
from strategies import LoraStrategy
from strategies.masked_round import words_sent
from strategies.sampling import draw, with_spare


@dataclass(frozen=True)
class Spread:
    """The least, the median and the greatest of some numbers."""

    least: float
    median: float
    greatest: float

    @staticmethod
    def of(numbers: Iterable[float]) -> Spread:
        """Of at least one number."""
        ordered = sorted(numbers)
        return Spread(ordered[0], statistics.median(ordered), ordered[-1])


@dataclass(frozen=True)
class Traffic:
    """Bytes of the numbers in the training messages, as ``rounds.jsonl`` counts them.

    Attributes:
        clients: that train in round 1.
        up, down: of round 1.
        total_up, total_down: of all rounds.
        exact: whether chance has no part in it, if every client answers: with Poisson samples of
            clients, all of these are means.
    """

    clients: float
    up: float
    down: float
    total_up: float
    total_down: float
    exact: bool


def traffic(config: RunConfig, strategy: LoraStrategy, layout: Layout) -> Traffic:
    """What the rule's plan sends, round by round."""
    ups, downs, exact, before = [], [], True, list[int]()
    for server_round in range(1, config.rounds + 1):
        plan = strategy.plan(server_round)
        count, certain = taking_part(config, strategy, server_round)
        exact = exact and certain
        up, known = uploaded(config, strategy, layout, server_round)
        exact = exact and known
        ups.append(count * up)
        down = sum(field.bytes for field in layout.select(plan.send, plan.personal))
        if strategy.sums == "masked":
            down += words_sent(strategy.summed(server_round), layout)[1]
        asked = count
        if config.clock.mode == "rounds":
            spare = config.clock.over_select
            asked = with_spare(int(count), spare, config.clients.training)
        downs.append(asked * (down + base_bytes(strategy, layout, before)))
        before.append(int(count))
    count, _ = taking_part(config, strategy, 1)
    return Traffic(count, ups[0], downs[0], sum(ups), sum(downs), exact)


def base_bytes(strategy: LoraStrategy, layout: Layout, rounds: Sequence[int]) -> int:
    """Of what these rounds, of so many clients each, have added to the frozen weights."""
    fields, total = {(field.pair, field.factor): field for field in layout.fields}, 0
    added: dict[int, int] = {}  # by an adapter's rank
    for pair in layout.scales:
        (r, d_in), (d_out, _) = (fields[pair, factor].shape for factor in FACTORS)
        if r not in added:
            added[r] = sum(strategy.added_rank(count, r) for count in rounds)
        total += numbers(added[r], d_out, d_in) * FLOATS[fields[pair, "A"].dtype]
    return total


def uploaded(
    config: RunConfig, strategy: LoraStrategy, layout: Layout, server_round: int
) -> tuple[float, bool]:
    """Bytes that a client sends in a round on average, and whether chance has no part in it."""
    plan = strategy.plan(server_round)
    if strategy.sums == "masked":
        secure, count = strategy.secure, taking_part(config, strategy, server_round)[0]
        words = FixedPoint(secure.clip, secure.bits, secure.examples, int(count)).dtype
        sums = strategy.summed(server_round)
        one_pass = sums is not None and not sums.two_passes  # else the rank of the mean A counts
        return int(words[4:]) // 8 * words_sent(sums, layout)[0], one_pass
    if not config.adapter.ranks:
        return sum(field.bytes for field in layout.select(plan.train, plan.personal)), True
    known = strategy.client_privacy is None
    pruned = plan.gamma < 1  # nobody knows when
    clients = drawn(config, strategy, server_round) if known else range(config.clients.number)
    ranks = [config.adapter.rank_of(client) for client in clients]
    own = {rank: narrowed(layout, rank).select(plan.train) for rank in set(ranks)}
    total = sum(field.bytes for rank in ranks for field in own[rank])
    return total / len(ranks), not pruned and (known or len(own) == 1)


def taking_part(config: RunConfig, strategy: LoraStrategy, server_round: int) -> tuple[float, bool]:
    """How many clients train in a round, and whether that is certain."""
    if privacy := strategy.client_privacy:
        planned = privacy.planned()
        return (planned, False) if privacy.sampling == "poisson" else (int(planned), True)
    return len(drawn(config, strategy, server_round)), config.clock.mode == "none"


def drawn(config: RunConfig, strategy: LoraStrategy, server_round: int) -> list[int]:
    """The clients that train in a round.

    Where whole clients are private, as many, the first; so with FedBuff. On a virtual clock that
    waits for rounds, all are taken to be there and none to be lost.
    """
    number = config.clients.training
    if strategy.client_privacy:
        return list(range(max(1, round(strategy.client_privacy.planned()))))
    if config.clock.mode == "fedbuff":  # who they are is the clock's to say
        return list(range(config.clock.buffer))
    least = strategy.min_train_nodes
    return draw(list(range(number)), strategy.fraction_train, least, strategy.seed, server_round)


def total_steps(config: RunConfig, strategy: LoraStrategy, counts: Sequence[int]) -> float:
    """Steps of all clients in all rounds; a mean where whole clients are private.

    ``counts``: each client's examples.
    """
    steps = [config.train.step_count(count) for count in counts]
    if strategy.client_privacy:
        return config.rounds * taking_part(config, strategy, 1)[0] * statistics.fmean(steps)
    rounds = range(1, config.rounds + 1)
    return sum(steps[client] for number in rounds for client in drawn(config, strategy, number))


def in_turn(seconds: Iterable[float], workers: int) -> float:
    """When the last of these jobs is done, if each goes to whichever worker is free first."""
    free = [0.0] * workers
    for duration in seconds:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def packs_of(clients: Sequence[int], size: int) -> list[Sequence[int]]:
    """The clients in packs, as a grid forms them."""
    return [clients[start : start + size] for start in range(0, len(clients), size)]
