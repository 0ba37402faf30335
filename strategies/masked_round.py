"""A round whose updates the server sees as one sum, or as two where the rule takes two passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedlora.errors import PrivacyError, WireError, wrong
from fedlora.faults import reach
from fedlora.fixed_point import Words
from fedlora.masked_vector import HEAD, decoded, first_like, numbers, second_like, tensors
from fedlora.rounds import INPUTS, MASKED, GlobalState, LocalPlan
from fedlora.sums import RidgeSums, Sums, Tensors, known
from fedlora.sums_order import Limits, SumsOrder
from fedlora.wire import Layout, size
from strategies.adding import check_sums, to_arrays
from strategies.masked import MaskedSum, told_arrays, words_in
from strategies.merging import check_enough, concluded
from strategies.replies import Reply, collect, halved, refusal
from strategies.virtual_time import in_time

if TYPE_CHECKING:
    from strategies.base import LoraStrategy


def masked_round(
    strategy: LoraStrategy,
    grid: Grid,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Ask, wait and merge; ``(None, None)`` keeps the adapter.

    Keys and shares go before the training message, whose reply is the masked part of a sum; shares
    of whoever replied unmask it. Who drops out before the training message is in no sum, who does
    so before its reply has its masks recovered, and of those that unmask ``secure.threshold`` are
    enough. A second pass is a sum of its own over the same clients; who is lost before its part of
    that has come costs the round, since sums over fewer would tell of it alone.
    """
    if strategy.train_metrics_aggr_fn:
        raise wrong("train_metrics_aggr_fn", "a function", "none with masked sums")
    messages = list(strategy.configure_train(server_round, arrays, config, grid))
    if not messages:
        return None, None
    try:
        return _merged(strategy, grid, server_round, messages, timeout)
    except (PrivacyError, WireError) as error:
        return strategy._keep(str(error))


def check_masked(rule: str, sums: Sums | None, private: bool, key: str = "sums") -> None:
    """Make sure that a rule can be merged from masked sums; ``key`` is what asked for them.

    Raises:
        ConfigError: it cannot.
    """
    check_sums(rule, sums, private, key, "masked")
    if isinstance(sums, RidgeSums) and not sums.ridge:
        raise wrong("options.ridge", sums.ridge, "above 0 with masked sums, which are rounded")


def words_sent(sums: Sums | None, layout: Layout) -> tuple[int, int]:
    """How many words a client sends in a round of these sums, and bytes a second pass tells it."""
    kind = known(sums)
    like = first_like(kind, layout)
    told = kind.question(like)
    again = numbers(second_like(kind, layout, told)) if told else 0
    return HEAD + numbers(like) + again, sum(tensor.nbytes for tensor in told.values())


def _merged(
    strategy: LoraStrategy,
    grid: Grid,
    server_round: int,
    messages: list[Message],
    timeout: float,
) -> tuple[ArrayRecord, MetricRecord]:
    """The next adapter and the mean training loss.

    Raises:
        WireError: too few clients lasted, or what they made up is no adapter.
    """
    trace, state, layout = strategy.trace, strategy._state, strategy._layout
    assert state is not None and layout is not None  # configure_train has set them
    each, trace.bytes_down = trace.bytes_down // len(messages), 0
    config, plan = strategy.secure, strategy.plan(server_round)
    asked, notes = trace.asked, trace.failures
    masks = MaskedSum.of(grid, server_round, timeout, asked, config, notes)
    included = masks.open()
    order = _order(strategy, masks, layout, plan, server_round)
    messages = [_with(m, masks, order) for m in messages if m.metadata.dst_node_id in included]
    trace.asked = {node: asked[node] for node in included}
    trace.bytes_down = each * len(messages)
    messages = in_time(strategy, server_round, messages)
    reach("dispatch")
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    reach("received")
    limits = Limits(adapter=trace.adapter, base=trace.base)
    found = collect(replies, trace.asked, "train", server_round, INPUTS, limits)
    notes += found.failures
    strategy._clients.update({reply.node: reply.client for reply in found.good})
    like = first_like(order.sums, layout)
    parts, good = _parts(strategy, masks, found.good, HEAD + numbers(like))
    check_enough(len(parts), max(strategy.min_train_nodes, 1))
    totals = decoded(masks.total(parts), like, len(parts), masks.fixed)
    sums = dict(totals.sums)
    if told := order.sums.question(sums):
        sums |= _again(strategy, masks, order, told, good, totals.examples)
    trace.halved = halved(good)
    merged = order.sums.merged(state, sums)
    after, arrays = concluded(strategy, plan, state, layout, merged, [])
    _done(strategy, after, good)
    return arrays, MetricRecord({"train_loss": totals.loss})


def _done(strategy: LoraStrategy, after: GlobalState, good: Sequence[Reply]) -> None:
    """Note what the round made."""
    strategy.memory, strategy.trace.merged = after.memory, True
    strategy.trace.clients = tuple(reply.client for reply in good)


def _order(
    strategy: LoraStrategy, masks: MaskedSum, layout: Layout, plan: LocalPlan, server_round: int
) -> SumsOrder:
    """How clients add up what they trained."""
    sums, key = strategy.summed(server_round), strategy.weighted_by_key
    limits = Limits(norm=strategy.max_norm)
    return SumsOrder.of(masks.token, sums, layout, plan, server_round, key, limits)


def _with(message: Message, masks: MaskedSum, order: SumsOrder) -> Message:
    """A training message that asks for a masked reply."""
    node = message.metadata.dst_node_id
    message.content[MASKED] = masks.turn(node, order.text())
    return message


def _parts(
    strategy: LoraStrategy, masks: MaskedSum, replies: Sequence[Reply], count: int
) -> tuple[dict[int, Words], list[Reply]]:
    """The masked words by node, and the replies that hold some."""
    parts, good, dtype = dict[int, Words](), [], masks.fixed.dtype
    for reply in replies:
        try:
            parts[reply.node] = words_in(reply.content, count, dtype)
            good.append(reply)
        except WireError as error:
            strategy.trace.failures.append(refusal(reply.client, "train", error))
    strategy.trace.bytes_up += sum(words.nbytes for words in parts.values())
    return parts, good


def _again(
    strategy: LoraStrategy,
    before: MaskedSum,
    order: SumsOrder,
    told: Tensors,
    good: Sequence[Reply],
    examples: int,
) -> Tensors:
    """The sums of a second pass over exactly the clients of the first.

    Raises:
        WireError: one of them was lost.
    """
    clients = {reply.node: reply.client for reply in good}
    masks = MaskedSum(
        before.grid,
        before.server_round,
        before.timeout,
        clients,
        before.threshold,
        before.fixed,
        before.failures,
        before.token,
    )
    _all(clients, masks.open())
    arrays = to_arrays(told)
    strategy.trace.bytes_down += len(clients) * size(arrays)
    messages = [
        Message(
            told_arrays(arrays, masks.turn(node, order.text())),
            node,
            "query.again",
            group_id=str(masks.server_round),
        )
        for node in clients
    ]
    replies = list(masks.grid.send_and_receive(messages, timeout=masks.timeout))
    found = collect(replies, clients, "train", masks.server_round, INPUTS, Limits())
    strategy.trace.failures += found.failures
    like = second_like(order.sums, order.layout, told)
    parts, _ = _parts(strategy, masks, found.good, numbers(like))
    _all(clients, parts)
    return tensors(masks.fixed.whole(masks.total(parts)), like, examples, masks.fixed)


def _all(clients: Mapping[int, int], found: Sequence[int] | Mapping[int, object]) -> None:
    """Refuse a second pass over fewer clients than the first."""
    if lost := sorted(clients[node] for node in clients.keys() - {*found}):
        raise WireError(
            "masked sums: between the two passes were lost the updates of clients "
            f"{', '.join(map(str, lost))}"
        )
