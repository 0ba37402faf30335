"""A client's update as its masked part of a sum, in the place of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from clients import masking
from clients.masking import KEPT, STATE
from fedlora.errors import FedloraError, PrivacyError, WireError
from fedlora.fixed_point import FixedPoint, Words
from fedlora.masked_vector import encoded
from fedlora.masks import Roster, Secrets, masked
from fedlora.ranks import unpacked
from fedlora.records import arrays_in, configs_in, metrics_in
from fedlora.rounds import INPUTS, MASKED, ClientUpdate
from fedlora.sums_order import SumsOrder
from fedlora.wire import tensors

Packed = Callable[..., "list[Message | FedloraError]"]


class MaskingApp(ClientApp):
    """A client app whose training replies are masked where the message asks for it."""

    def __init__(self) -> None:
        """Answer what masked sums ask."""
        super().__init__(mods=[masked_reply])
        for step in (masking.keys, masking.shares, masking.unmask, again):
            self.query(step.__name__)(step)


@dataclass(frozen=True)
class Turn:
    """A client's turn to put in its part of a sum.

    Attributes:
        roster, secrets, included: see ``fedlora.masks``.
        node: the client's.
        order: how its update is summed.
        fixed: how sums count.
        sealed: what ``included`` sealed for it.
    """

    roster: Roster
    secrets: Secrets
    node: int
    included: list[int]
    order: SumsOrder
    fixed: FixedPoint
    sealed: list[bytes]

    @staticmethod
    def of(message: Message, context: Context) -> Turn | None:
        """What the message asks for; None if it asks for no masks.

        Raises:
            WireError: it is not this client's turn, or too few are to be in the sum.
            PrivacyError: the update was to go in the clear, and this node sends none that way.
        """
        asked = configs_in(message.content).get(MASKED)
        if asked is None:
            if masking.floor(context):
                raise PrivacyError(
                    "this node sends masked updates alone (masked in its configuration), and the "
                    'message asks for one in the clear; allowed: launch.sums = "masked"'
                )
            return None
        state = masking.at(context, asked, "shares")
        roster, node = masking.roster_in(state), message.metadata.dst_node_id
        included = masking.nodes_in(asked, "included")
        known = included == sorted(roster.keys.keys() & {*included})
        if not known or node not in included or len(included) < roster.threshold:
            raise WireError(
                f"masked sums: {len(included)} clients are to be in the sum, allowed: "
                f"{roster.threshold} or more of those that gave keys, this one among them"
            )
        fixed = FixedPoint(cast(float, asked["clip"]), *_whole(asked, "bits", "examples", "of"))
        if len(included) > fixed.clients:
            raise WireError("masked sums: more clients than sums were sized for")
        sealed = cast(list[bytes], asked["sealed"])
        if len(sealed) != len(included):
            raise WireError(f"masked sums: {len(sealed)} sealed shares of {len(included)} clients")
        order, mine = SumsOrder.read(str(asked["order"])), masking.secrets_in(state)
        return Turn(roster, mine, node, included, order, fixed, sealed)

    def over(self, message: Message, reply: Message) -> tuple[Message, ArrayRecord]:
        """A training reply whose update is masked, and the update for a second pass.

        What the server checks of updates in the clear is checked here.

        Raises:
            WireError: the update is none that may be summed.
        """
        order, content = self.order, reply.content
        adapter = unpacked(
            arrays_in(content)["arrays"],
            order.layout,
            order.train,
            order.shared(arrays_in(message.content)["arrays"]),
            order.limits.norm,
        )
        metrics = metrics_in(content)["metrics"]
        examples, loss = metrics[order.weighted_by_key], metrics.get("train_loss", 0.0)
        if not isinstance(examples, int) or isinstance(loss, list):
            raise WireError(f"{order.weighted_by_key!r} is {examples!r}, expected a whole number")
        update = ClientUpdate(self.node, adapter, 1.0)
        words = encoded(order.sums.first([update]), examples, self.fixed, float(loss))
        said = {key: record for key, record in configs_in(content).items() if key != MASKED}
        found = self._sent(message, words, {**said})
        kept = order.layout.pack(adapter)
        kept["examples"] = Array(numpy.array([examples]))
        return found, kept

    def second(self, message: Message, kept: ArrayRecord) -> Message:
        """The masked part of a second pass, from the update that was kept."""
        order = self.order
        examples = int(kept["examples"].numpy()[0])
        arrays = ArrayRecord({key: kept[key] for key in kept if key != "examples"})
        update = ClientUpdate(self.node, order.layout.unpack(arrays), 1.0)
        told = tensors(arrays_in(message.content)["told"])
        words = encoded(order.sums.second([update], told), examples, self.fixed)
        return self._sent(message, words, {})

    def keep(self, context: Context, kept: ArrayRecord | None = None) -> None:
        """Note that the part was put in, and what a second pass needs."""
        state = configs_in(context.state)[STATE]
        included = masking.names(self.included)
        context.state[STATE] = ConfigRecord(
            {**state, "included": included, "sealed": self.sealed, "stage": "masked"}
        )
        if kept is not None and self.order.sums.two_passes:
            context.state[KEPT] = kept

    def _sent(self, message: Message, words: Words, said: dict[str, ConfigRecord]) -> Message:
        """A reply with the masked words."""
        hidden = masked(words, self.roster, self.node, self.secrets, self.included)
        arrays, count = ArrayRecord({MASKED: Array(hidden)}), MetricRecord({INPUTS: 1})
        return Message(RecordDict({"arrays": arrays, "metrics": count, **said}), reply_to=message)


def masked_reply(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: a training message that asks for masks gets a masked reply."""
    if message.metadata.message_type.partition(".")[0] != "train":
        return call_next(message, context)
    turn = Turn.of(message, context)
    reply = call_next(message, context)
    if turn is None:
        return reply
    reply, kept = turn.over(message, reply)
    turn.keep(context, kept)
    return reply


def masked_pack(train_pack: Packed) -> Packed:
    """The same for the messages of a pack, each masked by itself."""

    def masking_pack(
        self: ClientApp, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | FedloraError]:
        """See the method that this is put around."""
        turns = [Turn.of(*pair) for pair in zip(messages, contexts, strict=True)]
        replies = train_pack(self, messages, contexts)
        for place, (turn, reply) in enumerate(zip(turns, replies, strict=True)):
            if turn is None or isinstance(reply, FedloraError):
                continue
            try:
                replies[place], kept = turn.over(messages[place], reply)
            except FedloraError as error:
                replies[place] = error
            else:
                turn.keep(contexts[place], kept)
        return replies

    return masking_pack


def again(message: Message, context: Context) -> Message:
    """This client's part of a second pass, from the update that it kept."""
    turn = Turn.of(message, context)
    if turn is None or KEPT not in context.state:
        raise WireError("masked sums: this client holds no update for a second pass")
    reply = turn.second(message, arrays_in(context.state)[KEPT])
    turn.keep(context)
    return reply


def _whole(record: ConfigRecord, *keys: str) -> list[int]:
    """Whole numbers of a record."""
    return [int(cast(int, record[key])) for key in keys]
