"""What a client says and keeps for a masked sum: its keys, its shares, and what it reveals at last.

Its secrets lie in its Flower context between the messages of one sum, and are gone when it has
revealed the shares that the sum needs. Flower keeps contexts in the memory of the SuperNode, and
sends them nowhere but to the node's own client processes; our grids keep them in the run's process.

A client takes part in each step of a sum once. It reveals, of every other client, the share of its
own mask or that of its key, and never both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedlora.errors import PrivacyError, WireError
from fedlora.masks import PublicKeys, Roster, Secrets, opened_shares, sealed_shares
from fedlora.records import configs_in
from fedlora.rounds import MASKED

STATE, KEPT = "fedlora-masks", "fedlora-masked-update"  # records in a context's state
SEEDS = ("seal", "mask", "own")


def keys(message: Message, context: Context) -> Message:
    """Fresh public keys for one sum; what was kept for another, but for the pass before, goes.

    Raises:
        WireError: they were given already.
    """
    asked = _asked(message)
    token, after = str(asked["token"]), str(asked.get("after", ""))
    before = _kept(context, STATE)
    if before.get("token") == token:
        raise WireError("masked sums: this client has given its keys for this sum already")
    if after and (before.get("token") != after or KEPT not in context.state):
        raise WireError("masked sums: this client holds no update for a second pass")
    if not after:
        context.state.pop(KEPT, None)
    mine = Secrets.fresh()
    seeds = dict(zip(SEEDS, (mine.seal, mine.mask, mine.own), strict=True))
    whole = before["lasted"] if after else []
    context.state[STATE] = ConfigRecord(
        {"token": token, "stage": "keys", "whole": cast(list[str], whole), **seeds}
    )
    public = mine.public()
    return _said(message, ConfigRecord({"token": token, "seal": public.seal, "mask": public.mask}))


def shares(message: Message, context: Context) -> Message:
    """Shares of this client's secrets for all who gave keys, sealed for each.

    Raises:
        WireError: this client's keys are not among them, or the threshold is too low.
        PrivacyError: it is lower than this node allows.
    """
    asked = _asked(message)
    state, node = at(context, asked, "keys"), message.metadata.dst_node_id
    roster, mine = roster_in(asked), secrets_in(state)
    if roster.keys.get(node) != mine.public():
        raise WireError("masked sums: this client's keys are not among those that were handed out")
    least = floor(context)
    if roster.threshold < least:
        raise PrivacyError(
            f"masked sums: found a threshold of {roster.threshold} clients, allowed: at least "
            f"{least}, which this node asks for (masked in its configuration)"
        )
    sealed = sealed_shares(roster, node, mine)
    told = {key: asked[key] for key in ("threshold", "nodes", "seal-keys", "mask-keys")}
    context.state[STATE] = ConfigRecord({**state, **told, "stage": "shares"})
    return _said(message, ConfigRecord({"token": roster.token, "sealed": list(sealed.values())}))


def unmask(message: Message, context: Context) -> Message:
    """A share of each client that was to be in the sum: of its own mask if it lasted, or its key.

    Raises:
        WireError: both are asked for, or too few lasted, or this client is not in the sum; or, in
            a second pass, not all lasted whose first pass was summed.
    """
    asked = _asked(message)
    state, node = at(context, asked, "masked"), message.metadata.dst_node_id
    roster, mine = roster_in(state), secrets_in(state)
    lasted, dropped = nodes_in(asked, "lasted"), nodes_in(asked, "dropped")
    included = nodes_in(state, "included")
    if sorted([*lasted, *dropped]) != included:
        raise WireError(
            "masked sums: each client that was to be in the sum has lasted or dropped out; this "
            "asks for both, for neither, or for another client"
        )
    if len(lasted) < roster.threshold or node not in lasted:
        raise WireError(
            f"masked sums: {len(lasted)} clients lasted, and {roster.threshold} must, this one "
            "among them"
        )
    whole = nodes_in(state, "whole")
    if whole and lasted != whole:
        raise WireError("masked sums: a second pass is over the clients of the first, no others")
    found = []
    for sender, sealed in zip(included, cast(list[bytes], state["sealed"]), strict=True):
        try:
            own, mask = opened_shares(roster, node, mine, sender, sealed)
        except WireError:  # whoever sealed nothing for this client has not hurt the others
            own = mask = b""
        found.append(own if sender in lasted else mask)
    done: dict[str, str | list[str]] = {"token": roster.token, "stage": "done"}
    if whole or KEPT not in context.state:
        context.state.pop(KEPT, None)
    else:
        done["lasted"] = names(lasted)
    context.state[STATE] = ConfigRecord({**done})
    return _said(message, ConfigRecord({"token": roster.token, "shares": found}))


def at(context: Context, asked: ConfigRecord, stage: str) -> ConfigRecord:
    """A client's state for the sum that is asked about.

    Raises:
        WireError: it is of another sum, or at another stage.
    """
    state = _kept(context, STATE)
    if state.get("token") != asked["token"] or state.get("stage") != stage:
        found = state.get("stage", "nothing") if state.get("token") == asked["token"] else "nothing"
        raise WireError(
            f"masked sums: this client has done {found!r} for this sum, allowed: {stage!r}; each "
            "step is taken once"
        )
    return state


def floor(context: Context) -> int:
    """The least threshold that this node allows; 0 where it also sends updates in the clear."""
    return int(cast(int, context.node_config.get(MASKED, 0)))


def roster_in(record: ConfigRecord) -> Roster:
    """The roster that a record tells of.

    Raises:
        WireError: see ``Roster``.
    """
    seal, mask = (cast(list[bytes], record[key]) for key in ("seal-keys", "mask-keys"))
    public = (PublicKeys(*both) for both in zip(seal, mask, strict=True))
    nodes = dict(zip(nodes_in(record, "nodes"), public, strict=True))
    return Roster(str(record["token"]), int(cast(int, record["threshold"])), nodes)


def secrets_in(state: ConfigRecord) -> Secrets:
    """A client's secrets for a sum."""
    return Secrets(*(cast(bytes, state[name]) for name in SEEDS))


def nodes_in(record: ConfigRecord, key: str) -> list[int]:
    """Node ids; as text, since they need not fit into Flower's integers."""
    return [int(node) for node in cast(list[str], record[key])]


def names(nodes: Sequence[int]) -> list[str]:
    """And back."""
    return [str(node) for node in nodes]


def _asked(message: Message) -> ConfigRecord:
    """What a message says of a masked sum."""
    return configs_in(message.content)[MASKED]


def _kept(context: Context, name: str) -> ConfigRecord:
    """A record of a client's state; empty if there is none."""
    return configs_in(context.state).get(name, ConfigRecord())


def _said(message: Message, record: ConfigRecord) -> Message:
    """A reply that holds a record."""
    return Message(RecordDict({MASKED: record}), reply_to=message)
