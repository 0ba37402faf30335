"""Adding up on workers what their clients send, and on the server what the workers added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedlora.records import arrays_in, configs_in
from fedlora.rounds import ClientUpdate
from fedlora.sums_order import SumsOrder
from simulations.answers import answers, failed
from strategies.adding import Totals, to_arrays, to_tensors
from strategies.replies import as_updates, collect

SUMS, PACK = "sums", "pack-sums"  # records of the reply that carries a pack's sums


class Reducer:
    """Answers packs; where a message asks for sums, it checks and adds up what clients send.

    Of a round whose sums need a second pass it holds the updates until the next one begins.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._order: SumsOrder | None = None
        self._held: dict[tuple[int, ...], list[ClientUpdate]] = {}

    def answers(
        self, app: ClientApp, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message]:
        """See ``answers``; with sums, arrays are left out of all replies and summed in one."""
        order = order_in(messages[0])
        if order is None or self._order is None or order.token != self._order.token:
            self._order, self._held = order, {}
        replies = answers(app, messages, contexts)
        return replies if order is None else self._reduced(order, messages, replies)

    def held(self, token: str) -> list[tuple[int, ...]]:
        """The packs of a round whose updates are here."""
        return sorted(self._held) if self._order and self._order.token == token else []

    def again(self, pack: tuple[int, ...], told: ArrayRecord) -> ArrayRecord:
        """A held pack's sums of the second pass."""
        assert self._order is not None
        return to_arrays(self._order.sums.second(self._held[pack], to_tensors(told)))

    def _reduced(
        self, order: SumsOrder, messages: Sequence[Message], replies: Sequence[Message]
    ) -> list[Message]:
        """Replies without arrays, bad ones as errors; the first good one carries the sums."""
        layout, shared = order.layout, order.shared(_sent(messages[0]))
        updates, good, reduced, bytes_up = [], [], [], 0
        for message, reply in zip(messages, replies, strict=True):
            node = message.metadata.dst_node_id
            key, limits = order.weighted_by_key, order.limits
            found = collect([reply], {node: node}, "train", order.server_round, key, limits)
            bytes_up += found.bytes_up
            own, _, refused = as_updates(found.good, layout, order.plan, shared, limits.norm)
            reasons = [failure.reason for failure in (*found.failures, *refused)]
            if own and own[0].client != node:
                reasons = [f"says it is client {own[0].client}, and is {node}"]
            if reasons:
                reduced.append(failed(message, reasons[0]))
                continue
            updates += own
            for key in list(arrays_in(reply.content)):
                del reply.content[key]
            good.append(reply)
            reduced.append(reply)
        if updates:
            clients = tuple(update.client for update in updates)
            sums = order.sums.first(updates)
            good[0].content[SUMS] = to_arrays(sums)
            good[0].content[PACK] = ConfigRecord({"clients": list(clients), "bytes": bytes_up})
            if order.sums.two_passes:
                self._held[clients] = updates
        return reduced


def order_in(message: Message) -> SumsOrder | None:
    """What sums a training message asks for."""
    if message.metadata.message_type != "train":
        return None
    for record in configs_in(message.content).values():
        if isinstance(text := record.get(SUMS), str):
            return SumsOrder.read(text)
    return None


class Fold:
    """Adds the packs' sums in the order of their clients, whichever comes first.

    Only what came before its turn is kept beside the totals.
    """

    def __init__(self, nodes: Iterable[int]) -> None:
        """``nodes``: everyone who is asked."""
        self._unanswered = set(nodes)
        self._early: dict[tuple[int, ...], tuple[ArrayRecord, int]] = {}
        self.totals = Totals()

    def take(self, reply: Message) -> None:
        """Note a reply, and take the sums out of it."""
        self._unanswered.discard(reply.metadata.src_node_id)
        if reply.has_content() and SUMS in arrays_in(reply.content):
            pack = configs_in(reply.content)[PACK]
            clients = tuple(cast(list[int], pack["clients"]))
            self._early[clients] = (
                arrays_in(reply.content)[SUMS],
                cast(int, pack["bytes"]),
            )
            del reply.content[SUMS], reply.content[PACK]
        first = min(self._unanswered, default=None)
        for clients in sorted(self._early):
            if first is None or clients[0] < first:
                arrays, bytes_up = self._early.pop(clients)
                self.totals = self.totals.plus(clients, to_tensors(arrays), bytes_up)


def _sent(message: Message) -> ArrayRecord:
    """The adapter in a training message."""
    (arrays,) = arrays_in(message.content).values()
    return arrays
