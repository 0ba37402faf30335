"""FFA-LoRA: A is never trained, never averaged, and equal everywhere; B averages exactly."""

from __future__ import annotations

import numpy
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from fedlora.errors import ConfigError
from fedlora.lowrank import Adapter, LoraPair
from fedlora.wire import Layout, fingerprint
from strategies import FedAvg, FfaLora, LoraFair
from tests.helpers import (
    MODULES,
    RANK,
    SCALES,
    VECTORS,
    Answer,
    bits,
    build,
    dense,
    dense_mean,
    difference,
    key,
    layer,
    layout_of,
    merged,
    normal,
    play,
    random,
    random_adapter,
    record_of,
    relative,
    reply,
    trained,
)

torch.set_num_threads(1)

TIGHT = 1e-10
COUNTS = {1: [7.0], 2: [3.0, 5.0], 5: [1.0, 10.0, 4.0, 2.5, 7.0]}
START = random_adapter(100)
WIRE_START = random_adapter(100, dtype=torch.float32)


def uploads(count: int, start: Adapter = START) -> list[Adapter]:
    return [trained(build(FfaLora), start, seed) for seed in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mean_of_products_is_product_of_means(count: int) -> None:
    adapters, weights = uploads(count), normal(COUNTS[count])
    found = merged(build(FfaLora), adapters, COUNTS[count], START)
    for name, ab in found.pairs.items():
        assert relative(dense(ab), dense_mean(adapters, weights, name)) < 1e-14
        assert torch.equal(ab.A, START.pairs[name].A)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_fedavg_and_lora_fair_when_a_is_frozen(count: int) -> None:
    """No drift of A, no error to correct."""
    adapters, counts = uploads(count), COUNTS[count]
    found = merged(build(FfaLora), adapters, counts, START)
    for other in (
        build(FedAvg),
        build(LoraFair),
        build(LoraFair, ridge=0.0),
        build(LoraFair, solver="cosine_sgd", ridge=0.0, steps=20),
    ):
        assert difference(merged(other, adapters, counts, START), found) < TIGHT


@pytest.mark.parametrize("send_frozen", [True, False])
def test_a_is_the_same_bits_after_many_rounds(send_frozen: bool) -> None:
    """Half of the clients send A back, half do not; nobody's A ever moves."""
    layout = layout_of(WIRE_START)
    strategy = build(FfaLora, send_frozen=send_frozen)
    prints = set()

    def script(node: int, message: Message) -> Answer:
        here = layout.unpack(message.content["arrays"], frozen=WIRE_START)
        prints.add(fingerprint(here, ("A",)))
        pairs = {
            name: LoraPair(ab.A, ab.B + 0.1 * (node + 1), ab.scale)
            for name, ab in here.pairs.items()
        }
        return reply(record_of(Adapter(pairs, here.vectors), "AB" if node % 2 else "B"), node + 1)

    done = play(strategy, WIRE_START, script, clients=4, rounds=4)
    assert [record.failures for record in done.records] == [()] * 5
    assert [record.clients for record in done.records[1:]] == [(0, 1, 2, 3)] * 4
    end = layout.unpack(done.arrays)
    assert prints | {fingerprint(end, ("A",))} == {fingerprint(WIRE_START, ("A",))}
    for name, ab in end.pairs.items():
        assert torch.equal(ab.A, WIRE_START.pairs[name].A)
        # each round adds (1 * .1 + 2 * .2 + 3 * .3 + 4 * .4) / 10 = 0.3
        torch.testing.assert_close(ab.B, WIRE_START.pairs[name].B + 1.2)


def test_client_that_trained_a_is_refused_by_layer() -> None:
    adapters = uploads(3, WIRE_START)
    moved = adapters[1].pairs[layer("value")]
    nudged = moved.A.clone()
    nudged[2, 3] = torch.nextafter(nudged[2, 3], torch.tensor(9.0))
    pairs = {**adapters[1].pairs, layer("value"): LoraPair(nudged, moved.B, moved.scale)}
    stock = [record_of(a) for a in (adapters[0], Adapter(pairs, adapters[1].vectors), adapters[2])]
    script = [reply(arrays, 10 + node) for node, arrays in enumerate(stock)]
    done = play(build(FfaLora), WIRE_START, script)
    assert list(done.reasons) == [1]
    assert "encoder.value.lora_A.weight' differs from the shared draw" in done.reasons[1]
    assert "this client trained factor A; this method trains B only" in done.reasons[1]
    assert done.records[1].clients == (0, 2)
    assert bits(done.arrays) == bits(
        play(build(FfaLora), WIRE_START, [script[0], script[2]]).arrays
    )


def test_a_minus_zero_is_the_same_number() -> None:
    """Signs of zeros are lost on some paths; they do not make a client a cheat."""
    pairs = {
        name: LoraPair(torch.zeros_like(ab.A), ab.B, ab.scale)
        for name, ab in WIRE_START.pairs.items()
    }
    start = Adapter(pairs, WIRE_START.vectors)
    negative = {name: LoraPair(-ab.A, ab.B, ab.scale) for name, ab in pairs.items()}
    sent = record_of(Adapter(negative, WIRE_START.vectors))
    assert play(build(FfaLora), start, [reply(sent)]).records[1].clients == (0,)


def test_without_send_frozen_only_b_and_heads_travel() -> None:
    strategy = build(FfaLora, send_frozen=False)
    script = [reply(record_of(a, "B"), 5) for a in uploads(2, WIRE_START)]
    done = play(strategy, WIRE_START, script)
    numbers = sum(RANK * d_out for d_out, _, _ in MODULES.values()) + 3 * 7 + 3
    assert (done.records[1].bytes_down, done.records[1].bytes_up) == (2 * 4 * numbers,) * 2
    for message in done.grid.sent:
        config = message.content["config"]
        assert set(message.content["arrays"]) == {*[key(m, "B") for m in MODULES], *VECTORS}
        assert (config["train"], config["kept"]) == ("B", "A")
        assert config["kept-fingerprint"] == fingerprint(WIRE_START, ("A",))
    assert set(done.arrays) == set(record_of(WIRE_START))


def test_by_default_a_travels_down_for_stock_clients() -> None:
    """Up 75 B + 24 head numbers, down 75 B + 102 A + 24 head: not half, by the layers' shapes."""
    script = [reply(record_of(a, "B"), 5) for a in uploads(2, WIRE_START)]
    done = play(build(FfaLora), WIRE_START, script)
    assert done.records[1].bytes_up == 2 * 4 * (75 + 24)
    assert done.records[1].bytes_down == 2 * 4 * (75 + 102 + 24)
    config = done.grid.sent[0].content["config"]
    assert (config["train"], config["kept"], config["kept-fingerprint"]) == ("B", "", "")


def test_adapter_without_pairs_is_refused() -> None:
    """MiSS, or only a head: there is no A to freeze."""
    heads = ArrayRecord({"model.miss.weight": Array(numpy.zeros((2, 3), numpy.float32))})
    with pytest.raises(ConfigError, match="this adapter has no factors A and B"):
        play(build(FfaLora, scales=None), heads, [reply(heads), reply(heads)])


def test_one_full_batch_step_is_centralised_gradient_descent() -> None:
    """Least squares through s B A0: averaging by examples equals a step on the pooled rows."""
    start = START.pairs[layer("query")]
    d_out, d_in, s, lr = 7, 11, 0.5, 0.01
    x = [random(n, d_in, seed=n) for n in (4, 9, 1)]
    y = [random(n, d_out, seed=50 + n) for n in (4, 9, 1)]

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        B = start.B.clone().requires_grad_(True)
        loss = (inputs @ (s * B @ start.A).T - targets).square().sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, B)
        return start.B - lr * gradient

    adapters = [
        Adapter({layer("query"): LoraPair(start.A, step(*rows), s)})
        for rows in zip(x, y, strict=True)
    ]
    found = merged(build(FfaLora), adapters, [4, 9, 1], Adapter({layer("query"): start}))
    pooled = step(torch.cat(x), torch.cat(y))
    torch.testing.assert_close(found.pairs[layer("query")].B, pooled, rtol=TIGHT, atol=1e-12)


def test_by_hand() -> None:
    name = layer("query")
    A = torch.tensor([[2.0, 0.0, 1.0]])
    adapters = [
        Adapter({name: LoraPair(A, torch.tensor([[4.0], [0.0]]))}),
        Adapter({name: LoraPair(A, torch.tensor([[0.0], [8.0]]))}),
    ]
    found = merged(build(FfaLora), adapters, [1.0, 3.0])
    assert found.pairs[name].B.tolist() == [[1.0], [6.0]]
    assert found.pairs[name].delta().tolist() == [[2.0, 0.0, 1.0], [12.0, 0.0, 6.0]]


def test_scales_reach_the_state() -> None:
    layout = Layout.of(record_of(START), SCALES)
    found = merged(build(FfaLora), uploads(2), COUNTS[2], layout.unpack(record_of(START)))
    assert {name: ab.scale for name, ab in found.pairs.items()} == SCALES
