"""Each word that a rule says of itself, held to what the rule does.

Whether it is exact is asked in ``test_rules_compared.py``, beside the other rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedlora.base_change import base_tensors
from fedlora.lowrank import Adapter, weighted_sum
from fedlora.rounds import FACTORS, ClientUpdate, Factor, GlobalState
from fedlora.sums import WEIGHT, Sums
from simulations import rules_table
from strategies import METHODS
from strategies.base import LoraStrategy
from strategies.traits import Traits
from tests.helpers import (
    MODULES,
    RANK,
    VECTORS,
    build,
    dense,
    difference,
    layer,
    merged,
    play,
    random,
    random_adapter,
    reply,
    sent,
    trained,
    updates_of,
    uploads,
)

torch.set_num_threads(1)

START = random_adapter(100)
CORE = Adapter(  # what trains between two factors that never change
    {},
    {layer(name).format("R"): random(RANK, RANK, seed=n) for n, name in enumerate(MODULES)}
    | START.vectors,
)
COUNTS = [1.0, 10.0, 4.0, 2.5, 7.0]
ROUNDS = 4
HEADS = sum(math.prod(shape) for shape in VECTORS.values())


def said(method: str) -> Traits:
    """What a rule says; it must say it in its own class, since nothing inherits from a rule."""
    assert "traits" in vars(METHODS[method]), f"{method} has no traits; see strategies/traits.py"
    found = METHODS[method].traits
    assert found is not None
    return found


def start_of(method: str) -> Adapter:
    """An adapter of the kind that the rule is for."""
    return CORE if said(method).result == "core" else START


def as_run(method: str) -> LoraStrategy:
    """The rule as recipes run it: clients draw a frozen A themselves."""
    if said(method).result == "core":
        return build(method, scales=None)  # which are of factors that train
    drawn = "send_frozen" in {field.name for field in fields(METHODS[method])}
    return build(method, send_frozen=False) if drawn else build(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_says_what_it_is(method: str) -> None:
    assert said(method).up and said(method).down


def evaluated(formula: str, d_out: int, d_in: int, clients: int, before: int) -> int:
    """One layer's numbers by a formula."""
    names = {"r": RANK, "d_out": d_out, "d_in": d_in, "K": clients, "t": before}
    found = eval(formula, {"__builtins__": {}, "min": min, "max": max}, names)
    assert isinstance(found, int)
    return found


def promised(formulas: tuple[str, ...], clients: int, server_round: int, heads: int = HEADS) -> int:
    """All layers' numbers in one message of a round, with those of the heads that travel."""
    formula = formulas[(server_round - 1) % len(formulas)]
    layers = [
        evaluated(formula, *shape[:2], clients, server_round - 1) for shape in MODULES.values()
    ]
    return sum(layers) + heads


def counted(content: RecordDict) -> int:
    """The numbers in all arrays of a message."""
    return sum(
        math.prod(array.shape)
        for record in content.array_records.values()
        for array in record.values()
    )


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_formulas_are_the_numbers_in_the_messages(method: str, clients: int) -> None:
    """Of four rounds, on layers none of which is square, in every message."""
    assert all(d_out != d_in for d_out, d_in, _ in MODULES.values())
    strategy, received = as_run(method), dict[tuple[int, int], int]()
    start, heads = start_of(method), 0 if "heads" in strategy.plan(1).personal else HEADS

    def answer(node: int, message: Message) -> RecordDict:
        server_round = int(message.metadata.group_id)
        adapter = trained(strategy, start, 10 * server_round + node, server_round)
        content = reply(sent(strategy, adapter, server_round), COUNTS[node])
        received[server_round, node] = counted(content)
        return content

    done = play(strategy, start, answer, clients, ROUNDS)
    assert all(record.merged for record in done.records[1:])
    assert len(received) == len(done.grid.sent) == clients * ROUNDS
    for (server_round, _), found in received.items():
        assert found == promised(said(method).up, clients, server_round, heads)
    for message in done.grid.sent:
        server_round = int(message.metadata.group_id)
        down = promised(said(method).down, clients, server_round, heads)
        assert counted(message.content) == down
    for record in done.records[1:]:
        ways = (said(method).up, said(method).down)
        each = (promised(way, clients, record.round, heads) for way in ways)
        assert (record.bytes_up, record.bytes_down) == tuple(8 * clients * n for n in each)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_round_leaves(method: str) -> None:
    """Factors of the same shapes and scales; the base changes only where the rule says so."""
    strategy, start = build(method), start_of(method)
    for server_round in (1, 2):
        adapters = uploads(strategy, start, 5, server_round)
        state = strategy.merge(GlobalState(start, server_round - 1), updates_of(adapters, COUNTS))
        changed = bool(base_tensors(state.memory))
        assert changed == (said(method).result == "LoRA + base") == strategy.changes_base
        if said(method).result == "core":
            continue
        assert state.adapter.pairs.keys() == START.pairs.keys()
        for name, pair in state.adapter.pairs.items():
            old = START.pairs[name]
            assert (pair.A.shape, pair.B.shape) == (old.A.shape, old.B.shape)
            assert pair.scale == old.scale


def bent(
    strategy: LoraStrategy, factors: Iterable[Factor], server_round: int, start: Adapter
) -> float:
    """How much of noise on these factors of all uploads is squared in the merged weight change.

    Of ``f(t)``, the change with t times the noise: ``|f(t) - 2 f(0) + f(-t)|`` over
    ``|f(t) - f(-t)|``, the largest of all layers.
    """
    adapters = uploads(strategy, start, 3, server_round)

    def change(t: float) -> dict[str, Tensor]:
        noisy = []
        for number, adapter in enumerate(adapters):
            noise, pairs = random_adapter(900 + number), {}
            for name, pair in adapter.pairs.items():
                moved = {f: getattr(pair, f) + t * getattr(noise.pairs[name], f) for f in factors}
                pairs[name] = replace(pair, **moved)
            noisy.append(Adapter(pairs, adapter.vectors))
        found = merged(strategy, noisy, COUNTS[:3], start, server_round)
        if strategy.plan(server_round).personal:  # the change is each client's own
            found = noisy[0]
        return {name: dense(pair) for name, pair in found.pairs.items()}

    above, here, below = change(0.5), change(0.0), change(-0.5)
    return max(
        float((above[n] - 2 * here[n] + below[n]).norm() / (above[n] - below[n]).norm())
        for n in here
    )


@pytest.mark.parametrize(
    "method", [n for n, rule in METHODS.items() if not rule.traits or rule.traits.result != "core"]
)
def test_what_becomes_of_noise(method: str) -> None:
    """Noise on what one step moves, in four rounds: linear, or times itself."""
    strategy = build(method)
    plans = {number: strategy.plan(number) for number in range(1, ROUNDS + 1)}
    for number, plan in plans.items():
        steps = [(factor,) for factor in plan.train] if plan.by_step else [plan.train]
        found = [bent(strategy, factors, number, START) for factors in steps]
        squared = said(method).noise == "quadratic"
        assert min(found) > 1e-3 if squared else max(found) < 1e-10
    both = all(plan.by_step and set(plan.train) == set(FACTORS) for plan in plans.values())
    assert both == (said(method).noise == "by turns")


def summed_up(sums: Sums, state: GlobalState, updates: list[ClientUpdate]) -> GlobalState:
    """The merge from sums over two packs."""
    packs = [updates[:2], updates[2:]]

    def added(parts: list[Any]) -> dict[str, Tensor]:
        return {
            key: weighted_sum([part[key] for part in parts], [1.0] * len(parts)) for key in parts[0]
        }

    totals = added([sums.first(pack) for pack in packs])
    if sums.two_passes:
        told = sums.question(totals)
        totals |= added([sums.second(pack, told) for pack in packs])
    assert totals[WEIGHT] == sum(COUNTS)
    return sums.merged(state, totals)


@pytest.mark.parametrize("method", [n for n in METHODS if build(n).summed() is not None])
def test_a_merge_from_sums_is_the_merge(method: str) -> None:
    strategy = build(method)
    for server_round in (1, 2):
        sums = strategy.summed(server_round)
        assert sums is not None
        adapters = uploads(strategy, START, 5, server_round)
        state, updates = GlobalState(START, server_round - 1), updates_of(adapters, COUNTS)
        whole, added = strategy.merge(state, updates), summed_up(sums, state, updates)
        assert added.round == whole.round
        assert difference(added.adapter, whole.adapter) < 1e-12


def test_the_table_has_a_row_for_every_rule_and_says_when_one_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "silent", type("Silent", (METHODS["fedavg"],), {"traits": None}))
    rows = {row["method"]: row for row in rules_table.entries()}
    assert list(rows) == [f"`{name}`" for name in METHODS]
    assert rows["`silent`"]["exact"] == rows["`silent`"]["up"] == rules_table.NOTHING
    assert rows["`rolora`"]["up"] == "r d_out, then r d_in"
    assert [rows[f"`{n}`"]["sums"] for n in ("fedavg", "lora_fair", "krum")] == [
        "1 pass",
        "2 passes",
        "no",
    ]
    assert rows["`fedsvd`"]["client privacy"] == "yes" and rows["`krum`"]["client privacy"] == "no"


def test_the_readme_holds_the_table_that_the_code_prints() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    begin, end = (
        "<!-- rules: what `fedlora list methods --table` prints -->",
        "<!-- end of rules -->",
    )
    assert text.count(begin) == text.count(end) == 1
    assert text.partition(begin)[2].partition(end)[0].strip() == rules_table.markdown()


WRONG: dict[str, tuple[str, Callable[[str], None], dict[str, Any]]] = {
    "half of FedAvg's upload": (
        "fedavg",
        lambda name: test_formulas_are_the_numbers_in_the_messages(name, 3),
        {"up": ("r * d_out",)},
    ),
    "FFA-LoRA as half of both": (
        "ffa_lora",
        lambda name: test_formulas_are_the_numbers_in_the_messages(name, 3),
        {"up": ("r * (d_in + d_out) // 2",)},
    ),
    "RoLoRA's turns the other way": (
        "rolora",
        lambda name: test_formulas_are_the_numbers_in_the_messages(name, 1),
        {"up": ("r * d_in", "r * d_out")},
    ),
    "a base that changes": ("fedavg", test_what_a_round_leaves, {"result": "LoRA + base"}),
    "FedAvg linear in noise": ("fedavg", test_what_becomes_of_noise, {"noise": "linear"}),
    "FFA-LoRA quadratic": ("ffa_lora", test_what_becomes_of_noise, {"noise": "quadratic"}),
    "LA-LoRA linear": ("la_lora", test_what_becomes_of_noise, {"noise": "linear"}),
    "FedAvg by turns": ("fedavg", test_what_becomes_of_noise, {"noise": "by turns"}),
}


@pytest.mark.parametrize("lie", WRONG)
def test_a_wrong_word_is_noticed(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, check, words = WRONG[lie]
    check(method)
    monkeypatch.setattr(METHODS[method], "traits", replace(said(method), **words))
    with pytest.raises(AssertionError):
        check(method)


def test_nothing_said_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = type("Silent", (METHODS["fedavg"],), {})
    monkeypatch.setitem(METHODS, "silent", silent)
    with pytest.raises(AssertionError, match="silent has no traits"):
        test_a_rule_says_what_it_is("silent")
