"""FedSA-LoRA on the server: A alone is averaged and travels; B and heads are nobody else's."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Message

from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter, LoraPair
from fedlora.wire import Layout
from strategies import FedAvg, FedSaLora
from tests.helpers import (
    MODULES,
    RANK,
    VECTORS,
    Answer,
    bits,
    build,
    key,
    layer,
    layout_of,
    merged,
    play,
    random_adapter,
    record_of,
    reply,
    uploads,
)

torch.set_num_threads(1)

START = random_adapter(100, dtype=torch.float32)
A_KEYS = {key(module, "A") for module in MODULES}
OF_A = 4 * RANK * sum(d_in for _, d_in, _ in MODULES.values())  # bytes


def test_by_hand() -> None:
    name = layer("query")
    B = torch.tensor([[1.0], [3.0]])
    start = Adapter({name: LoraPair(torch.tensor([[2.0, 1.0]]), B)})
    rows = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    adapters = [Adapter({name: LoraPair(row, B)}) for row in rows]
    found = merged(build(FedSaLora, scales=None), adapters, [1.0, 3.0], start)
    assert found.pairs[name].A.tolist() == [[1.0, 6.0]]
    assert found.pairs[name].B is B


def test_a_is_that_of_fedavg_and_the_rest_is_not_touched() -> None:
    """Whatever a client would have made of its B: the server keeps what it began with."""
    rule = build(FedSaLora)
    theirs = [random_adapter(seed) for seed in (1, 2, 3)]
    found = merged(rule, theirs, [1.0, 2.0, 3.0], START)
    averaged = merged(build(FedAvg), theirs, [1.0, 2.0, 3.0], START)
    for name, pair in found.pairs.items():
        assert torch.equal(pair.A, averaged.pairs[name].A)
        assert pair.B is START.pairs[name].B
    assert found.vectors == START.vectors


def test_two_rounds_on_the_wire() -> None:
    """Each way r d_in numbers a layer, on layers that are not square; what is asked is said."""
    told = []

    def script(node: int, message: Message) -> Answer:
        ask, arrays = message.content["config"], message.content["arrays"]
        told.append((ask["train"], ask["kept"], ask["kept-fingerprint"], ask["personal"]))
        assert set(arrays) == A_KEYS
        here = layout_of(START).unpack(arrays, START, ("A",), personal=("B", "heads"))
        moved = {n: LoraPair(ab.A + node + 1, ab.B, ab.scale) for n, ab in here.pairs.items()}
        sent = record_of(Adapter(moved), "A")
        return reply(sent, 2 * node + 1)

    done = play(build(FedSaLora), START, script, clients=2, rounds=2)
    assert told == [("AB", "", "", ["B", "heads"])] * 4
    for record in done.records[1:]:
        assert (record.bytes_up, record.bytes_down) == (2 * OF_A, 2 * OF_A)
        assert (record.clients, record.failures) == ((0, 1), ())
        assert record.aggregation_error is None
    before = bits(record_of(START))
    for name, data in bits(done.arrays).items():
        assert (data == before[name]) == (name not in A_KEYS), name
    end = layout_of(START).unpack(done.arrays)
    for name, pair in end.pairs.items():  # each round adds (1 * 1 + 3 * 2) / 4
        torch.testing.assert_close(pair.A, START.pairs[name].A + 2 * 7 / 4)


def test_local_training_alone_shares_nothing() -> None:
    """Nothing travels, the server's adapter stays, and a reply with anything in it is refused."""
    asked = []

    def script(node: int, message: Message) -> Answer:
        ask, arrays = message.content["config"], message.content["arrays"]
        asked.append((ask["train"], ask["kept"], ask["personal"], list(arrays)))
        strays = record_of(Adapter(START.pairs), "A") if node == 2 else ArrayRecord()
        return reply(strays, node + 1)

    done = play(build(FedSaLora, share="none"), START, script, clients=3, rounds=2)
    assert asked == [("AB", "", ["A", "B", "heads"], [])] * 6
    for record in done.records[1:]:
        assert record.merged and (record.bytes_up, record.bytes_down) == (OF_A, 0)
        assert record.clients == (0, 1)
        assert record.aggregation_error is None
    assert done.reasons == {2: f"array {key('query', 'A')!r} was sent, and stays with its client"}
    assert bits(done.arrays) == bits(record_of(START))


@pytest.mark.parametrize("stray", [key("query", "B"), next(iter(VECTORS))])
def test_what_should_have_stayed_is_refused(stray: str) -> None:
    """Also where it is the first draw: nothing says that the next one would be."""
    rule, whole = build(FedSaLora), record_of(START)
    good = [record_of(Adapter(a.pairs), "A") for a in uploads(rule, START, 2)]
    good[1][stray] = whole[stray]
    done = play(rule, START, [reply(arrays) for arrays in good])
    assert done.reasons == {1: f"array {stray!r} was sent, and stays with its client"}
    assert done.records[1].clients == (0,)


def test_evaluation_sends_a_alone() -> None:
    def script(node: int, message: Message) -> Answer:
        if message.metadata.message_type == "evaluate":
            assert set(message.content["arrays"]) == A_KEYS
            assert message.content["config"]["personal"] == ["B", "heads"]
            return None
        return reply(record_of(Adapter(START.pairs), "A"))

    rule = build(FedSaLora, fraction_evaluate=1.0)
    done = play(rule, START, script, clients=2)
    kinds = [message.metadata.message_type for message in done.grid.sent]
    assert kinds == ["train", "train", "evaluate", "evaluate"]
    assert {failure.reason for failure in done.records[1].failures} == {"no reply"}


def test_private_noise_moves_a_alone() -> None:
    from strategies import ClientPrivacy

    privacy = ClientPrivacy(noise_multiplier=1.0, clip=1.0, clients=2)
    rule = build(FedSaLora, client_privacy=privacy)
    arrays = [record_of(Adapter(a.pairs), "A") for a in uploads(rule, START, 2)]
    done = play(rule, START, [reply(each) for each in arrays])
    before = bits(record_of(START))
    for name, data in bits(done.arrays).items():
        assert (data == before[name]) == (name not in A_KEYS), name


def test_an_adapter_without_factors_is_refused() -> None:
    whole = record_of(Adapter({}, START.vectors))
    with pytest.raises(ConfigError, match="this adapter has no factors A and B"):
        build(FedSaLora, scales=None).prepare(whole)


def test_a_layout_without_what_is_personal() -> None:
    """``select`` and ``unpack`` leave out the same."""
    layout = Layout.of(record_of(START))
    for personal in (("A",), ("B", "heads"), ("heads",)):
        kept = layout.pack(START, personal=personal)
        assert set(kept) == {f.key for f in layout.fields if f.piece not in personal}
        back = layout.unpack(kept, START, ("A", "B"), personal=personal)
        assert bits(layout.pack(back)) == bits(record_of(START))
