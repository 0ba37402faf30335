"""A client in a masked sum: each step once, one kind of share, and nothing of it in the clear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto

from fedlora.errors import FedloraError, PrivacyError, WireError
from fedlora.masks import Secrets, opened_shares
from fedlora.rounds import MASKED
from fedlora.wire import Layout
from strategies.masked import MaskedSum, told_arrays
from strategies.masked_round import _order
from tests.helpers import SCALES, build, record_of
from tests.masked_cases import START, app, update_of

NODES = (11, 12, 2**63 + 9)
LAYOUT = Layout.of(record_of(START), SCALES)


class Federation:
    """Three clients whose messages are carried by hand, each to a fresh process."""

    def __init__(self, method: str = "fedavg", **config: Any) -> None:
        from simulations.grid import identify

        identify()
        self.strategy = build(method, sums="masked")
        self.contexts = {
            node: Context(1, node, {"partition-id": place, **config}, RecordDict(), {})
            for place, node in enumerate(NODES)
        }
        self.masks = self.sums()

    def sums(self, after: str = "") -> MaskedSum:
        asked, grid = dict.fromkeys(NODES, 0), self
        masks = MaskedSum.of(grid, 1, 1.0, asked, self.strategy.secure, [])  # type: ignore[arg-type]
        masks.after = after
        return masks

    def send(self, node: int, kind: str, content: RecordDict) -> Message:
        """A context is written down and read back, as between two of Flower's processes."""
        context = context_from_proto(context_to_proto(self.contexts[node]))
        reply = app(Message(content, node, kind, group_id="1"), context)
        self.contexts[node] = context
        return reply

    def send_and_receive(self, messages: Any, timeout: float) -> list[Message]:
        found = []
        for message in messages:
            meta = message.metadata
            found.append(self.send(meta.dst_node_id, meta.message_type, message.content))
            found[-1].metadata.__dict__["_src_node_id"] = meta.dst_node_id
        return found

    def train(self, node: int, **turn: Any) -> Message:
        """Asks for a masked update; ``turn`` changes what is asked."""
        plan = self.strategy.plan(1)
        order = _order(self.strategy, self.masks, LAYOUT, plan, 1)
        ask = ConfigRecord({**self.masks.turn(node, order.text()), **turn})
        config = ConfigRecord({"train": "".join(plan.train)})
        content = {"arrays": record_of(START), "config": config, MASKED: ask}
        return self.send(node, "train", RecordDict({**content}))

    def unmask(self, node: int, lasted: list[int], dropped: list[int], **more: Any) -> Message:
        told = {"token": self.masks.token, "lasted": _text(lasted), "dropped": _text(dropped)}
        record = ConfigRecord({**told, **more})
        return self.send(node, "query.unmask", RecordDict({MASKED: record}))

    def trained(self) -> None:
        self.masks.open()
        for node in NODES:
            self.train(node)

    def state(self, node: int) -> ConfigRecord:
        return self.contexts[node].state.config_records["fedlora-masks"]


def _text(nodes: list[int]) -> list[str]:
    return [str(node) for node in nodes]


def refused(what: str, kind: type[FedloraError] = WireError) -> Any:
    return pytest.raises(kind, match=what)


def test_each_step_is_taken_once_and_in_order() -> None:
    fed, node = Federation(), NODES[0]
    with refused("has done 'nothing' for this sum, allowed: 'masked'"):
        fed.unmask(node, list(NODES), [])
    fed.masks.open()
    token = ConfigRecord({"token": fed.masks.token})
    with refused("has given its keys for this sum already"):
        fed.send(node, "query.keys", RecordDict({MASKED: token}))
    with refused("has done 'shares' for this sum, allowed: 'keys'"):
        fed.send(node, "query.shares", RecordDict({MASKED: token}))
    with refused("has done 'shares' for this sum, allowed: 'masked'"):
        fed.unmask(node, list(NODES), [])
    fed.train(node)
    with refused("has done 'masked' for this sum, allowed: 'shares'; each step is taken once"):
        fed.train(node)
    fed.unmask(node, list(NODES), [])
    with refused("has done 'done' for this sum, allowed: 'masked'"):
        fed.unmask(node, list(NODES), [])
    with refused("has done 'done' for this sum, allowed: 'shares'"):
        fed.train(node)


def test_one_kind_of_share_of_each_client() -> None:
    """The share of an own mask where a client lasted, that of its key where it did not."""
    four = (*NODES, 2**63 + 10)
    fed = Federation()
    fed.contexts[four[3]] = Context(1, four[3], {"partition-id": 3}, RecordDict(), {})
    fed.masks = MaskedSum.of(
        fed,  # type: ignore[arg-type]
        1,
        1.0,
        dict.fromkeys(four, 0),
        fed.strategy.secure,
        [],
    )
    fed.masks.open()
    for other in four[:3]:
        fed.train(other)
    node, lasted = four[0], list(four[:3])
    state, roster = fed.state(node), fed.masks.roster
    mine = Secrets(*(bytes(state[name]) for name in ("seal", "mask", "own")))
    for lists in [
        (list(four), [four[3]]),  # both of one
        (lasted, []),  # neither of one
        ([*lasted, 5], [four[3]]),  # a stranger
        ([*lasted, four[0]], [four[3]]),
        (lasted, [four[3], four[3]]),
    ]:
        with refused("asks for both, for neither, or for another client"):
            fed.unmask(node, *lists)
    with refused("2 clients lasted, and 3 must"):
        fed.unmask(node, list(four[:2]), list(four[2:]))
    with refused("3 clients lasted, and 3 must, this one among them"):
        fed.unmask(node, list(four[1:]), [node])
    found = fed.unmask(node, lasted, [four[3]]).content.config_records[MASKED]["shares"]
    for place, sender in enumerate(four):
        both = opened_shares(roster, node, mine, sender, fed.masks.sealed[sender][node])
        assert found[place] == both[0 if sender in lasted else 1]
        assert both[0] != both[1]


def test_secrets_last_from_process_to_process_and_no_longer_than_the_sum() -> None:
    fed, node = Federation(), NODES[0]
    fed.trained()
    held = {bytes(fed.state(node)[name]) for name in ("seal", "mask", "own")}
    assert len(held) == 3
    fed.unmask(node, list(NODES), [])
    assert dict(fed.state(node)) == {"token": fed.masks.token, "stage": "done"}
    fed.masks = fed.sums()
    fed.masks.open()
    fresh = {bytes(fed.state(node)[name]) for name in ("seal", "mask", "own")}
    assert not fresh & held


def test_no_reply_holds_a_secret() -> None:
    fed, replies = Federation(), list[Message]()
    send = fed.send
    fed.send = lambda *a: replies.append(send(*a)) or replies[-1]  # type: ignore[method-assign,func-returns-value]
    fed.trained()
    held = [bytes(fed.state(n)[name]) for n in NODES for name in ("seal", "mask", "own")]
    assert len(replies) == 9
    for reply in replies:
        told = [v for record in reply.content.config_records.values() for v in record.values()]
        flat = [v for value in told for v in (value if isinstance(value, list) else [value])]
        for secret in held:
            assert all(secret not in value for value in flat if isinstance(value, bytes))


def changed(fed: Federation, **change: Callable[[Any], Any]) -> Any:
    """What a client says to a roster that the server changed."""
    fed.masks._enough = lambda *_: None  # type: ignore[method-assign]
    ask = fed.masks._ask

    def lying(step: str, records: Any, read: Any) -> Any:
        if step == "shares":
            record = dict(next(iter(records.values())))
            record |= {key.replace("_", "-"): how(record) for key, how in change.items()}
            fed.send(NODES[0], "query.shares", RecordDict({MASKED: ConfigRecord(record)}))
        return ask(step, records, read)

    fed.masks._ask = lying  # type: ignore[method-assign]
    fed.masks.open()


def test_a_client_looks_at_the_roster_it_is_given() -> None:
    other = Secrets.fresh().public()
    with refused("this client's keys are not among those that were handed out"):
        changed(Federation(), mask_keys=lambda r: [other.mask, *r["mask-keys"][1:]])
    with refused("this client's keys are not among those that were handed out"):
        changed(Federation(), nodes=lambda r: ["1", *r["nodes"][1:]])
    with refused("a threshold of 2 with 3 clients; allowed: at least two clients, and more"):
        changed(Federation(), threshold=lambda r: 2)
    with refused("two clients have the same key"):
        changed(Federation(), seal_keys=lambda r: [*r["seal-keys"][:2], r["seal-keys"][1]])


def test_a_client_looks_at_who_is_to_be_in_the_sum() -> None:
    fed = Federation()
    fed.masks.open()
    node, rest = NODES[0], _text(list(NODES[1:]))
    for included in (rest, [str(node)], [str(node), *rest, "77"], [str(node), str(node), *rest]):
        with refused("clients are to be in the sum, allowed: 3 or more of those that gave keys"):
            fed.train(node, included=included)
    with refused("1 sealed shares of 3 clients"):
        fed.train(node, sealed=[b"x"])
    with refused("more clients than sums were sized for"):
        fed.train(node, of=2)
    assert fed.train(node)


def test_a_node_may_refuse_what_is_not_masked_or_of_too_few() -> None:
    content = {"arrays": record_of(START), "config": ConfigRecord({"train": "AB"})}
    assert Federation().send(NODES[0], "train", RecordDict({**content}))
    fed = Federation(masked=3)
    for kind in ("train", "train.default"):
        with refused("this node sends masked updates alone", PrivacyError):
            fed.send(NODES[0], kind, RecordDict({**content}))
    fed.trained()
    with refused("found a threshold of 3 clients, allowed: at least 4", PrivacyError):
        Federation(masked=4).masks.open()


def test_a_second_pass_is_over_the_same_clients_and_their_own_updates() -> None:
    fed = Federation("lora_fair")
    with refused("holds no update for a second pass"):
        fed.sums(after="x").open()
    fed.trained()
    first = fed.masks.token
    for node in NODES:
        fed.unmask(node, list(NODES), [])
    kept = fed.contexts[NODES[1]].state.array_records["fedlora-masked-update"]
    name, pair = next(iter(update_of(1).pairs.items()))
    assert kept[name.format("A")].numpy().tolist() == pair.A.tolist()
    with refused("holds no update for a second pass"):
        fed.sums(after="another").open()
    fed.masks = fed.sums(after=first)
    fed.masks.open()
    order = _order(fed.strategy, fed.masks, LAYOUT, fed.strategy.plan(1), 1)
    told = ArrayRecord()
    for layer, factors in update_of(0).pairs.items():
        rank, d_in = factors.A.shape
        told[f"V {layer}"] = Array(factors.A.double().T.contiguous().numpy() * 0 + 1.0)
        told[f"AV {layer}"] = Array(factors.A.double()[:, :rank].contiguous().numpy())
        assert d_in
    for node in NODES:
        fed.send(node, "query.again", told_arrays(told, fed.masks.turn(node, order.text())))
    state = dict(fed.state(NODES[0]))
    fed.contexts[NODES[0]].state["fedlora-masks"] = ConfigRecord({**state, "whole": ["11", "12"]})
    with refused("a second pass is over the clients of the first, no others"):
        fed.unmask(NODES[0], list(NODES), [])
    fed.unmask(NODES[1], list(NODES), [])
    assert list(fed.contexts[NODES[1]].state) == ["fedlora-masks"]


def test_an_update_is_kept_no_longer_than_to_the_next_sum() -> None:
    fed = Federation("lora_fair")
    fed.trained()
    for node in NODES:
        fed.unmask(node, list(NODES), [])
        assert "fedlora-masked-update" in fed.contexts[node].state
    fed.sums().open()
    assert all(list(context.state) == ["fedlora-masks"] for context in fed.contexts.values())


def test_shares_that_were_not_sealed_are_left_out() -> None:
    fed, node = Federation(), NODES[0]
    fed.masks.open()
    for other in NODES[1:]:
        fed.train(other)
    good = fed.masks.turn(node, "")["sealed"]
    assert isinstance(good, list)
    fed.train(node, sealed=[good[0], b"x" * len(good[1]), good[2]])
    found = fed.unmask(node, list(NODES), []).content.config_records[MASKED]["shares"]
    assert [len(share) for share in found] == [36, 0, 36]
