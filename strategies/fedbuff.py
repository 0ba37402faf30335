"""FedBuff: updates are merged as soon as a buffer of them is full, however old their start is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedlora import wire
from fedlora.errors import WireError
from fedlora.faults import begin, reach
from fedlora.lowrank import Adapter, LoraPair
from fedlora.rounds import ClientUpdate, GlobalState
from strategies.events import Filled, Flight, fill
from strategies.merging import check_enough, concluded
from strategies.messages import asked_of
from strategies.replies import Reply, as_updates, collect, halved, mean_metrics
from strategies.sampling import wanted
from strategies.virtual_time import note_lost

if TYPE_CHECKING:
    from strategies.base import LoraStrategy

Starts = dict[int, ArrayRecord]  # adapters by their version, which somebody has begun from
STARTED = "adapter"  # "adapter VERSION KEY" in ``Asking.clock`` is a tensor of one
Aged = tuple[ClientUpdate, Reply, int]  # an update on the newest adapter, and its staleness


def fedbuff_round(
    strategy: LoraStrategy,
    grid: Grid,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """One merge of a buffer; ``(None, None)`` keeps the adapter.

    Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba, "Federated Learning with Buffered
    Asynchronous Aggregation", AISTATS 2022, arXiv 2106.06639. With w the newest adapter, w_t the
    one t merges older that client k began from, and w_k what it trained, the rule merges

        w + (1 + t)^-power (w_k - w_t)   in the place of   w_k,

    so that one which averages makes w + sum_k p_k (1 + t)^-power (w_k - w_t) of it. The paper's
    power is 1/2 and its p_k are 1 / K; its server learning rate is ``server = "momentum"`` with
    ``server_beta1 = 0``. Staleness makes steps smaller, it does not share weight out anew.

    ``fraction_train`` of the nodes are at work at any time. Who will be merged follows from the
    clock alone, so a client is trained when its update is merged, from the adapter it began from,
    with the random numbers of the round after that; the others do not train, and release nothing.
    The aggregation error is that of the moved updates.
    """
    reach("before-sampling")
    nodes, layout = strategy._connected(grid, strategy.min_train_nodes), strategy.prepare(arrays)
    found, starts = _buffer(strategy, nodes, arrays, server_round)
    reach("after-sampling")
    state = GlobalState(layout.unpack(arrays), server_round - 1, strategy.memory)
    power = strategy.world.clock.staleness_power if strategy.world else 0.0
    aged: list[Aged] = []
    for version in sorted({task.version for task in found.batch}):
        members = sorted(task.client for task in found.batch if task.version == version)
        start, age = starts[version], server_round - 1 - version
        weight, old = (1.0 + age) ** -power, layout.unpack(start)
        for update, reply in _trained(strategy, grid, version, start, config, members, timeout):
            moved = _onto(state.adapter, old, update, weight) if age else update
            aged.append((moved, reply, age))
        begin(server_round)  # clients in this process have noted their own
    aged.sort(key=lambda one: one[0].client)
    updates, good = [update for update, _, _ in aged], [reply for _, reply, _ in aged]
    trace, plan = strategy.trace, strategy.plan(server_round)
    trace.halved = halved(good)
    try:
        check_enough(len(updates), max(strategy.min_train_nodes, 1))
        merged = strategy.merge(state, updates)
        after, sent = concluded(strategy, plan, state, layout, merged, updates)
    except WireError as error:
        return strategy._keep(str(error))
    strategy.memory = after.memory
    trace.merged, trace.clients = True, tuple(update.client for update in updates)
    trace.staleness = tuple(age for _, _, age in aged)
    if strategy.train_metrics_aggr_fn:
        contents = [reply.content for reply in good]
        return sent, strategy.train_metrics_aggr_fn(contents, strategy.weighted_by_key)
    return sent, mean_metrics(good)


def _buffer(
    strategy: LoraStrategy, nodes: Sequence[int], arrays: ArrayRecord, server_round: int
) -> tuple[Filled, Starts]:
    """The next full buffer, and the adapters that its tasks began from; the clock remembers."""
    world, layout, trace = strategy.world, strategy._layout, strategy.trace
    assert world is not None and layout is not None  # or there is no FedBuff
    plan, least = strategy.plan(server_round), strategy.min_train_nodes
    down = sum(field.bytes for field in layout.select(plan.send, plan.personal))
    up = sum(field.bytes for field in layout.select(plan.train, plan.personal))
    at_once = wanted(len(nodes), strategy.fraction_train, least)
    before = Flight.of(strategy.clock)
    found = fill(world, before, nodes, server_round - 1, at_once, down, up)
    trace.bytes_down += found.begun * down
    for task in found.lost:
        note_lost(strategy, task, task.ends)
    starts = {**_started(strategy.clock), server_round - 1: arrays}
    kept = {task.version for task in (*found.flight.flying, *found.flight.waiting)}
    strategy.clock = found.flight.tensors() | {
        f"{STARTED} {version} {key}": tensor
        for version in sorted(kept)
        for key, tensor in wire.tensors(starts[version]).items()
    }
    return found, starts


def _started(clock: Mapping[str, Tensor]) -> Starts:
    """The adapters that the clock remembers."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in clock.items():
        word, _, rest = name.partition(" ")
        if word == STARTED and rest:
            version, _, key = rest.partition(" ")
            found.setdefault(int(version), {})[key] = tensor
    return {version: wire.record(tensors) for version, tensors in found.items()}


def _trained(
    strategy: LoraStrategy,
    grid: Grid,
    version: int,
    start: ArrayRecord,
    config: ConfigRecord,
    members: Sequence[int],
    timeout: float,
) -> list[tuple[ClientUpdate, Reply]]:
    """What these clients make of an adapter, checked; who fails is noted in the trace."""
    trace, server_round, plan = strategy.trace, version + 1, strategy.plan(version + 1)
    layout = strategy.prepare(start)
    adapter = layout.unpack(start)
    record = asked_of(plan, adapter, config)
    trace.adapter = str(record["adapter"])
    payload = layout.pack(adapter, plan.send, plan.personal)
    messages = strategy.addressed_to("train", server_round, payload, record, members)
    reach("dispatch")
    replies = grid.send_and_receive(messages, timeout=timeout)
    reach("received")
    key, limits = strategy.weighted_by_key, strategy._limits()
    found = collect(replies, trace.asked, "train", server_round, key, limits)
    strategy._clients.update({reply.node: reply.client for reply in found.good})
    trace.bytes_up += found.bytes_up
    updates, good, refused = as_updates(found.good, layout, plan, adapter, strategy.max_norm)
    trace.failures += [*found.failures, *refused]
    return list(zip(updates, good, strict=True))


def _onto(newest: Adapter, start: Adapter, update: ClientUpdate, weight: float) -> ClientUpdate:
    """An update whose change since ``start`` is weighed and made to the newest adapter instead."""

    def moved(new: Tensor, old: Tensor, trained: Tensor) -> Tensor:
        change = torch.sub(trained.double(), old.double())
        return (new.double() + weight * change).to(trained.dtype)

    adapter = update.adapter
    pairs = {
        name: LoraPair(
            moved(pair.A, start.pairs[name].A, adapter.pairs[name].A),
            moved(pair.B, start.pairs[name].B, adapter.pairs[name].B),
            adapter.pairs[name].scale,
        )
        for name, pair in newest.pairs.items()
    }
    vectors = {
        key: moved(tensor, start.vectors[key], adapter.vectors[key])
        for key, tensor in newest.vectors.items()
    }
    return replace(update, adapter=Adapter(pairs, vectors))
