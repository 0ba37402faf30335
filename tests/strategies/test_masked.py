"""Masked sums: the rule's merge to the level, whoever drops out; too few, or a lie, end a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.app.error import Error

from fedlora.config_secure import SecureConfig
from fedlora.errors import ConfigError, FedloraError
from fedlora.fixed_point import FixedPoint, clear_sums
from fedlora.lowrank import LoraPair
from fedlora.rounds import INPUTS, MASKED
from fedlora.wire import size
from simulations.grid import InProcessGrid
from strategies import ClientPrivacy, Krum, LoraFair
from strategies.base import LoraStrategy
from tests.helpers import bits, build, difference, record_of
from tests.masked_cases import START, Done, Lossy, act, app, examples_of, run, update_of

torch.set_num_threads(1)
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "ffa_lora": {},
    "rolora": {},
    "fedsvd": {},
    "la_lora": {},
    "lora_fair": {},
}
CLIENTS = 7  # five of which must last
FIXED = FixedPoint(16.0, 32, 2**20, CLIENTS)


def rule(method: str = "fedavg", **more: Any) -> LoraStrategy:
    return build(method, **{"sums": "masked", **RULES.get(method, {}), **more})


def expected_means(clients: Sequence[int], factors: str = "AB") -> dict[str, numpy.ndarray]:
    """The means of levels by plain loops over the clients' numbers, in the clear."""
    weights, tensors = [examples_of(client) for client in clients], {}
    for name in update_of(0).pairs:
        for factor in factors:
            own = [getattr(update_of(c).pairs[name], factor) for c in clients]
            tensors[name.format(factor)] = own
    tensors |= {
        name: [update_of(client).vectors[name] for client in clients]
        for name in update_of(0).vectors
    }
    found = {}
    for name, own in tensors.items():
        values = [tensor.double().flatten().tolist() for tensor in own]
        sums = numpy.array(clear_sums(values, weights, FIXED), dtype=numpy.float64)
        mean = (sums * FIXED.step / sum(weights)).astype(numpy.float32)
        found[name] = mean.reshape(own[0].shape)
    return found


def is_the_mean_of(done: Done, clients: Sequence[int]) -> bool:
    """Whether the result is exactly the mean of these clients' levels, and the record says so."""
    expected = expected_means(clients)
    assert done.records[1].merged and done.records[1].clients == tuple(clients)
    weights = [examples_of(client) for client in clients]
    loss = numpy.average([0.1 * client for client in clients], weights=weights)
    assert done.records[1].train_loss == pytest.approx(loss, abs=FIXED.step)
    return all(
        numpy.array_equal(done.arrays[name].numpy(), value) for name, value in expected.items()
    )


def test_the_result_is_exactly_the_mean_of_levels_in_the_clear() -> None:
    done = run(rule(), Lossy(CLIENTS))
    assert is_the_mean_of(done, range(CLIENTS)) and not done.records[1].failures
    assert done.records[1].aggregation_error is None
    words = 2 + sum(value.size for value in expected_means([0]).values())
    assert done.records[1].bytes_up == 8 * words * CLIENTS


@pytest.mark.parametrize("method", RULES)
def test_a_masked_merge_is_the_merge(method: str) -> None:
    masked, plain = (
        run(rule(method, sums=sums), Lossy(CLIENTS), rounds=2) for sums in ("masked", "server")
    )
    assert difference(masked.adapter, plain.adapter) < 1e-6
    for ours, theirs in zip(masked.records[1:], plain.records[1:], strict=True):
        assert ours.merged and ours.clients == theirs.clients and not ours.failures
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-8)


def test_a_mean_is_off_by_half_a_level_at_most() -> None:
    """``|mean level - mean| <= step / 2``; the rest is float32's rounding of the mean itself."""
    coarse = SecureConfig(bits=12, clip=8.0, examples=64)
    masked = run(rule(secure=coarse), Lossy(CLIENTS))
    plain = run(rule(sums="server"), Lossy(CLIENTS))
    step = FixedPoint(8.0, 12, 64, CLIENTS).step
    off = max(
        float(numpy.abs(masked.arrays[key].numpy() - plain.arrays[key].numpy()).max())
        for key in plain.arrays
    )
    assert step / 20 < off <= step / 2 + 1e-6
    assert masked.records[1].bytes_up % 4 == 0 and masked.records[1].bytes_up == (
        run(rule(), Lossy(CLIENTS)).records[1].bytes_up / 2
    )


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "unmask"])
@pytest.mark.parametrize("gone", [[0, 6]])
def test_who_drops_out_at_any_stage_costs_itself_alone(stage: str, gone: list[int]) -> None:
    done = run(rule(), Lossy(CLIENTS, [(stage, node) for node in gone]))
    rest = [client for client in range(CLIENTS) if client not in gone or stage == "unmask"]
    assert is_the_mean_of(done, rest)
    before = "" if stage == "train" else f"{stage}: "
    assert done.reasons == dict.fromkeys(gone, f"{before}no reply")


def test_one_lost_at_each_of_two_stages_and_one_that_raises() -> None:
    done = run(rule(), Lossy(12, [("keys", 1), ("unmask", 5)]), client_4="raises")
    assert done.records[1].clients == (0, 2, 3, *range(5, 12))
    assert done.reasons[4] == "RuntimeError: client 4 gives up"
    assert {1, 4, 5} == done.reasons.keys()


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("keys", "gave keys"),
        ("shares", "gave shares"),
        ("train", "sent their part"),
        ("unmask", "gave the shares that unmask"),
    ],
)
def test_too_few_at_any_stage_lose_the_round(stage: str, what: str) -> None:
    done = run(rule(), Lossy(CLIENTS, [(stage, node) for node in (1, 2, 5)]))
    assert not done.records[1].merged and bits(done.arrays) == bits(run(rule(), Lossy(1)).arrays)
    asked = {"keys": 0, "shares": 0}.get(stage, CLIENTS)
    assert done.records[1].bytes_down == asked * size(record_of(START))  # to whom it was sent
    reason = f"masked sums: 4 clients {what}, 5 needed (secure.threshold)"
    assert done.reasons[None] == f"{reason}: the adapter stays as it was"


def test_a_lost_round_costs_no_other() -> None:
    done = run(rule(), Lossy(CLIENTS, [("train", node) for node in (1, 2, 5)]), rounds=2)
    assert [record.merged for record in done.records] == [False, False, True]


@pytest.mark.parametrize(
    "lost", [[("keys", 1), ("train", 0)], [("shares", 4), ("unmask", 3)], [("unmask 2", 6)]]
)
def test_two_passes_recover_who_drops_out(lost: list[tuple[str, int]]) -> None:
    masked = run(rule("lora_fair"), Lossy(CLIENTS, lost))
    gone = {node for stage, node in lost if not stage.startswith("unmask")}
    silent = {f"client_{node}": "raises" for node in gone}
    plain = run(rule("lora_fair", sums="server"), Lossy(CLIENTS), **silent)
    assert masked.records[1].clients == plain.records[1].clients
    assert masked.records[1].merged and difference(masked.adapter, plain.adapter) < 1e-6


@pytest.mark.parametrize("stage", ["keys 2", "shares 2", "again"])
def test_who_is_lost_between_two_passes_costs_the_round(stage: str) -> None:
    done = run(rule("lora_fair"), Lossy(CLIENTS, [(stage, 3)]), rounds=2)
    assert [record.merged for record in done.records] == [False, False, True]
    reason = "masked sums: between the two passes were lost the updates of clients 3"
    assert done.reasons[None] == f"{reason}: the adapter stays as it was"


def test_a_client_checks_its_own_update() -> None:
    kinds = {"client_1": "nan", "client_3": "far"}
    done = run(rule(), Lossy(CLIENTS), **kinds)
    assert done.records[1].clients == (0, 2, 4, 5, 6)
    assert "holds values that are not finite" in done.reasons[1]
    assert "holds a value of 17, allowed: at most 16 (secure.clip)" in done.reasons[3]
    done = run(rule(), Lossy(CLIENTS), client_0="many", client_6="half")
    assert "1048577 examples, allowed: 1 to 1048576 (secure.examples)" in done.reasons[0]
    assert "expected a whole number" in done.reasons[6]
    done = run(rule("ffa_lora"), Lossy(CLIENTS), client_0="frozen", client_2="none")
    assert "differs from the shared draw" in done.reasons[0] and "0 examples" in done.reasons[2]
    done = run(rule(max_norm=1e-3), Lossy(CLIENTS))
    assert "(max_norm)" in done.reasons[0] and not done.records[1].merged


def changed(kind: str, node: int, how: Any) -> Any:
    """Lets one client's reply to a kind of message be changed in place."""

    def change(seen: str, reply: Message) -> Message | None:
        if seen == kind and reply.metadata.src_node_id == node and reply.has_content():
            how(reply)
        return reply

    return change


def _set(key: str, value: Any) -> Any:
    def how(reply: Message) -> None:
        reply.content.config_records[MASKED][key] = value

    return how


def _words(make: Any) -> Any:
    def how(reply: Message) -> None:
        words = reply.content.array_records["arrays"][MASKED].numpy()
        reply.content["arrays"] = ArrayRecord({MASKED: Array(make(words))})

    return how


def _two(reply: Message) -> None:
    reply.content["more"] = ArrayRecord({"x": Array(numpy.zeros(1))})


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        ("keys", _set("token", "x"), "keys: answers for another sum"),
        ("keys", _set("seal", 3), "keys: gave no two keys"),
        ("keys", _set("mask", bytes(32)), "keys: masked sums: a key that is none"),
        ("keys", _set("mask", b"short"), "keys: masked sums: a key that is none"),
        ("shares", _set("sealed", [b"x"]), "shares: gave no list of 7 'sealed'"),
        ("shares", _set("sealed", [b"x"] * 7), "shares: gave 'sealed' of a wrong size"),
        ("shares", _set("sealed", 5), "shares: gave no list of 7 'sealed'"),
        ("train", _words(lambda w: w[:-1]), "sent no masked words, uint64[203]: it is uint64[202]"),
        ("train", _words(lambda w: w.view(numpy.int64)), "uint64[203]: it is int64[203]"),
        ("train", _words(lambda w: numpy.zeros((99, 99))), "it is 78536 bytes"),
        ("train", _two, "sent 2 arrays, expected 1 of masked words"),
        ("unmask", _set("shares", [b"x"] * 7), "unmask: gave 'shares' of a wrong size"),
        ("unmask", _set("shares", [b""]), "unmask: gave no list of 7 'shares'"),
    ],
)
def test_a_wrong_answer_costs_its_client_alone(kind: str, how: Any, reason: str) -> None:
    done = run(rule(), Lossy(CLIENTS, change=changed(kind, 2, how)))
    rest = [client for client in range(CLIENTS) if client != 2 or kind == "unmask"]
    assert is_the_mean_of(done, rest)
    assert done.reasons.keys() == {2} and reason in done.reasons[2]


def test_errors_and_strangers_are_heard_as_such() -> None:
    def change(kind: str, reply: Message) -> Message:
        if kind == "shares" and reply.metadata.src_node_id == 4:
            return Message(Error(5, "no room"), reply_to=reply)
        return reply

    done = run(rule(), Lossy(CLIENTS, change=change))
    assert is_the_mean_of(done, [0, 1, 2, 3, 5, 6])


def test_whoever_takes_anothers_key_is_left_out_and_so_is_the_other() -> None:
    seen: dict[int, bytes] = {}

    def change(kind: str, reply: Message) -> Message:
        record = reply.content.config_records.get(MASKED)
        if kind == "keys" and record is not None:
            seen[reply.metadata.src_node_id] = bytes(record["mask"])
            if reply.metadata.src_node_id == 5:
                record["mask"] = seen[0]
        return reply

    done = run(rule(), Lossy(CLIENTS, change=change))
    assert is_the_mean_of(done, [1, 2, 3, 4, 6])
    assert done.reasons == dict.fromkeys((0, 5), "keys: gave a key that another client has")


@pytest.mark.parametrize("place", [0, 3])
def test_wrong_shares_cost_the_round_never_the_adapter(place: int) -> None:
    def share(reply: Message) -> None:
        given = reply.content.config_records[MASKED]["shares"]
        given[place] = given[place][:-1] + bytes([given[place][-1] ^ 1])

    lost = [("train", 3)]  # so that place 3 is a share of a key, and place 0 of a mask
    done = run(rule(), Lossy(CLIENTS, lost, change=changed("unmask", 1, share)))
    assert not done.records[1].merged
    reason = done.reasons[None]
    assert any(part in reason for part in ("not of one secret", "did not cancel", "not that of"))


def test_garbage_costs_the_round_never_the_adapter() -> None:
    def garbage(words: Any) -> Any:  # its examples are as they were, so only the sums are wrong
        return numpy.concatenate([words[:1], words[1:] ^ words[:0:-1]])

    done = run(rule(), Lossy(CLIENTS, change=changed("train", 1, _words(garbage))))
    assert not done.records[1].merged and "did not cancel" in done.reasons[None]


def test_a_share_of_another_number_is_not_counted() -> None:
    def share(reply: Message) -> None:
        given = reply.content.config_records[MASKED]["shares"]
        given[0] = b"\x07" + given[0][1:]

    done = run(rule(), Lossy(CLIENTS, change=changed("unmask", 1, share)))
    assert is_the_mean_of(done, range(CLIENTS))


def test_no_message_to_the_server_tells_an_update_or_its_examples() -> None:
    grid = Lossy(CLIENTS)
    replies: list[Message] = []
    grid.change = lambda kind, reply: replies.append(reply) or reply
    run(rule("lora_fair"), grid)
    kinds = {reply.metadata.message_type for reply in replies}
    assert kinds == {"train", *(f"query.{s}" for s in ("keys", "shares", "again", "unmask"))}
    for reply in replies:
        arrays = [a for r in reply.content.array_records.values() for a in r.values()]
        assert all(array.dtype == "uint64" for array in arrays)
        metrics = [dict(record) for record in reply.content.metric_records.values()]
        assert metrics in ([], [{INPUTS: 1}])
        for record in reply.content.config_records.values():
            assert record.keys() <= {"client", "token", "seal", "mask", "sealed", "shares"}


def test_secrets_are_gone_when_the_round_is() -> None:
    for method in ("fedavg", "lora_fair"):
        grid = Lossy(CLIENTS)
        run(rule(method), grid)
        for context in grid.contexts.values():
            (record,) = context.state.values()
            assert {**record}.keys() == {"token", "stage"} and record["stage"] == "done"


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sums: found 'masked', allowed: 'server': Krum with"):
        Krum(sums="masked")
    with pytest.raises(ConfigError, match=r"LoraFair with these options needs single updates"):
        LoraFair(solver="cosine_sgd", sums="masked")
    with pytest.raises(ConfigError, match=r"options.ridge: found 0.0, allowed: above 0"):
        LoraFair(ridge=0.0, sums="masked")
    privacy = ClientPrivacy(noise_multiplier=1.0, clip=1.0, clients=4)
    with pytest.raises(ConfigError, match=r"allowed: 'server': client-level privacy"):
        rule(client_privacy=privacy)
    with pytest.raises(ConfigError, match=r"train_metrics_aggr_fn: .*allowed: none with masked"):
        run(rule(train_metrics_aggr_fn=lambda *_: MetricRecord()), Lossy(CLIENTS))
    with pytest.raises(ConfigError, match=r"secure.examples"):
        run(rule(secure=SecureConfig(examples=2**40)), Lossy(CLIENTS))
    with pytest.raises(FedloraError, match="start alone can do"):
        rule().aggregate_train(1, [Message(Error(0), reply_to=_any_message())])


def _any_message() -> Message:
    grid = Lossy(1)
    run(rule(sums="server"), grid)
    return grid.messages[0]


def test_the_order_of_arrival_changes_no_bit() -> None:
    class Backwards(InProcessGrid):
        def deliver(self, messages: Any, timeout: Any) -> Any:
            yield from reversed(list(super().deliver(messages, timeout)))

    assert act is not None
    plain, other = run(rule(), Lossy(CLIENTS)), run(rule(), Backwards(app, CLIENTS))
    assert bits(plain.arrays) == bits(other.arrays)
    assert isinstance(next(iter(plain.adapter.pairs.values())), LoraPair)
