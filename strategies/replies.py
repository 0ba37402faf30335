"""Replies to a round's messages: checked one by one, refused by name, put in client order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, TypeGuard

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedlora.errors import WireError
from fedlora.lowrank import Adapter
from fedlora.ranks import unpacked
from fedlora.records import arrays_in, configs_in, metrics_in
from fedlora.rounds import HALVED, ClientUpdate, Failure, LocalPlan
from fedlora.sums_order import Limits
from fedlora.wire import Layout, size

REASON = 300  # characters that are kept of a reason, which may be of a client's making


@dataclass(frozen=True)
class Reply:
    """One good reply: who sent it, its record, its checked weight and scalar metrics."""

    node: int
    client: int
    content: RecordDict
    examples: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Collected:
    """The replies of one stage, good ones in client order."""

    good: tuple[Reply, ...]
    failures: tuple[Failure, ...]
    bytes_up: int


def collect(
    replies: Iterable[Message],
    asked: Mapping[int, int],
    stage: Literal["train", "evaluate"],
    server_round: int,
    weighted_by_key: str,
    limits: Limits,
) -> Collected:
    """Check what every stage has in common: errors, round, duplicates, weight, silence.

    ``asked`` maps the node id of everyone a message went to to its client number: the node id
    itself as long as that is all that is known of it.
    """
    good: dict[int, Reply] = {}
    failures: list[Failure] = []
    answered: set[int] = set()
    numbers = {*asked, *asked.values()}
    unreachable: set[str] = set()
    bytes_up = 0
    for message in sorted(replies, key=lambda message: message.metadata.src_node_id):
        node = message.metadata.src_node_id
        client = asked.get(node, node)
        if node == SUPERLINK_NODE_ID and node not in asked and message.has_error():
            # Flower's own word for a node that is gone
            unreachable.add(message.error.reason or f"error code {message.error.code}")
            continue
        try:
            if node not in asked:
                raise WireError("was not asked")
            if node in answered:
                raise WireError("replied twice")
            answered.add(node)
            if message.has_error():
                raise WireError(message.error.reason or f"error code {message.error.code}")
            bytes_up += sum(size(record) for record in arrays_in(message.content).values())
            reply = _check(message, client, numbers, server_round, weighted_by_key, limits)
            if reply.client in good:
                raise WireError(f"says it is client {reply.client}, which has replied already")
            good[reply.client] = reply
        except WireError as error:
            failures.append(refusal(client, stage, error))
    silence = ": ".join(["no reply", *sorted(unreachable)])
    failures += [Failure(asked[node], stage, silence) for node in asked.keys() - answered]
    failures.sort(key=lambda failure: (failure.client or 0, failure.reason))
    return Collected(tuple(good[client] for client in sorted(good)), tuple(failures), bytes_up)


def as_updates(
    replies: Sequence[Reply], layout: Layout, plan: LocalPlan, shared: Adapter, max_norm: float
) -> tuple[list[ClientUpdate], list[Reply], list[Failure]]:
    """Training replies as the updates a method merges, the replies they came in, and the refused.

    ``shared`` is the global adapter, from which is filled in what was not to be trained or stays
    with clients, and ``max_norm`` the largest L2 norm of an upload.
    """
    updates, good, refused = [], [], []
    for reply in replies:
        try:
            records = list(arrays_in(reply.content).values())
            if len(records) != 1:
                raise WireError(f"sent {len(records)} array records, expected 1")
            adapter = unpacked(records[0], layout, plan.train, shared, max_norm, plan.personal)
            updates.append(ClientUpdate(reply.client, adapter, reply.examples, reply.metrics))
            good.append(reply)
        except WireError as error:
            refused.append(refusal(reply.client, "train", error))
    return updates, good, refused


def refusal(client: int, stage: Literal["train", "evaluate"], error: WireError) -> Failure:
    """A client that does not count, and why: one line, cut where a client made it endless."""
    reason = " ".join(str(error)[: 4 * REASON].split())
    cut = f"{reason[:REASON]}..." if len(reason) > REASON else reason
    return Failure(client, stage, cut)


def mean_metrics(replies: Sequence[Reply]) -> MetricRecord:
    """Scalar metrics averaged by examples, in client order; values that are no number are left out.

    A metric ``group.NAME.accuracy`` is averaged by ``group.NAME.examples``, which is summed.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for reply in replies:
        for key, value in reply.metrics.items():
            if not math.isfinite(value):
                continue
            if key.startswith("group.") and key.endswith(".examples"):
                weight = 1.0
            else:
                group = key.rsplit(".", 1)[0] + ".examples"
                weight = reply.metrics.get(group, reply.examples)
                weights[key] = weights.get(key, 0.0) + weight
            sums[key] = sums.get(key, 0.0) + weight * value
    return MetricRecord({key: sums[key] / weights.get(key, 1.0) for key in sorted(sums)})


def halved(replies: Sequence[Reply]) -> dict[int, int]:
    """How many trained together, of those who say that a larger pack did not fit into memory."""
    said = {reply.client: reply.metrics.get(HALVED, math.nan) for reply in replies}
    return {client: int(size) for client, size in said.items() if math.isfinite(size)}


def by_group(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    """One metric by group, such as accuracy, from averaged metrics."""
    prefix, suffix = "group.", f".{name}"
    return {
        key[len(prefix) : -len(suffix)]: float(value)
        for key, value in metrics.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }


def _check(
    message: Message,
    client: int,
    numbers: Set[int],
    server_round: int,
    weighted_by_key: str,
    limits: Limits,
) -> Reply:
    """One reply's round, metrics, weight and, if it says so, its client number."""
    if message.metadata.group_id not in ("", str(server_round)):
        raise WireError(f"belongs to round {message.metadata.group_id}, not {server_round}")
    records = list(metrics_in(message.content).values())
    if len(records) != 1:
        raise WireError(f"sent {len(records)} metric records, expected 1")
    scalars = {k: _number(v) for k, v in records[0].items() if not isinstance(v, list)}
    examples = scalars.pop(weighted_by_key, None)
    if examples is None or not math.isfinite(examples) or examples <= 0:
        found = records[0].get(weighted_by_key)
        raise WireError(f"{weighted_by_key!r} is {found!r}, expected a positive finite number")
    if examples > limits.examples:
        raise WireError(
            f"{weighted_by_key!r} is {examples:g}, allowed: at most {limits.examples:g} "
            "(max_examples)"
        )
    node, configs = message.metadata.src_node_id, configs_in(message.content)
    for record in configs.values():
        client = _said(record, node, client, numbers)
        if _whole(told := record.get("round")) and told != server_round:
            raise WireError(f"says it belongs to round {told}, not {server_round}")
        start = record.get("adapter", limits.adapter)
        if limits.adapter and start != limits.adapter:
            raise WireError(f"started from adapter {start!r}, and {limits.adapter!r} was sent")
    if limits.base and all(told.get("base-change") != limits.base for told in configs.values()):
        raise WireError(
            "does not say that it added what the record 'base' holds to its frozen weights "
            "(see wire.digest); this method needs clients that do"
        )
    return Reply(node, client, message.content, examples, scalars)


def _said(record: ConfigRecord, node: int, client: int, numbers: Set[int]) -> int:
    """The client number in a record; the one that is known if it holds none.

    A node may take none of the ``numbers`` by which those who were asked are known, nor another
    than it gave before.
    """
    said = record.get("client")
    if not _whole(said) or said == client:
        return client
    if said < 0 or said in numbers or client != node:
        raise WireError(f"says it is client {said}, and is client {client}")
    return said


def _whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: float) -> float:
    """A metric as a float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
