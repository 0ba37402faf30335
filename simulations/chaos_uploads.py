"""Hostile uploads against every rule: none counts, none ends a run, each is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message

from clients.client_app import app as client_app
from clients.resident import resident
from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.rounds import RoundRecord
from simulations.chaos_faults import Fault, Size
from simulations.grid import InProcessGrid
from simulations.hostile import MUTATORS, Mutator, Upload
from simulations.recipe import load
from simulations.server_app import client_config, server_view, strategy_for, threads
from strategies import METHODS, LoraStrategy

CLIENTS, HOSTILE, ROUNDS = 5, 2, 2
RANKS = (2, 4)  # the hostile client has the first
RECIPE = (f"clients.number={CLIENTS}", "train.steps=1", "launch.pack=1", f"rounds={ROUNDS}")

Answer = Callable[[Message, Message], Sequence[Message]]  # (asked, good reply) -> what is sent


@dataclass(frozen=True)
class Played:
    """What a short run left: the adapter, the rule's memory and the records."""

    arrays: dict[str, bytes]
    memory: dict[str, bytes]
    records: list[RoundRecord]


@dataclass(frozen=True)
class Tried:
    """What became of one hostile client in all rounds of a short run.

    Attributes:
        method, mutator: the rule, and what was wrong with the uploads.
        fault: what the server did wrong; empty if nothing.
    """

    method: str
    mutator: str
    fault: str


class Staged(InProcessGrid):
    """The replies of clients that train once; those of the hostile one are replaced."""

    def __init__(self, taped: dict[tuple[str, int], Message], hostile: Answer) -> None:
        """``taped``: good replies by round and client; what is not there is trained."""
        super().__init__(client_app, CLIENTS)
        self._taped, self._hostile = taped, hostile

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        """One reply for each client, and from the hostile one whatever it sends."""
        for message in messages:
            node = message.metadata.dst_node_id
            key = (message.metadata.group_id, node)
            if key not in self._taped:
                (self._taped[key],) = super().deliver([message], timeout)
            good = self._taped[key]
            yield from self._hostile(message, good) if node == HOSTILE else [good]


class Target:
    """One rule, with what its clients send."""

    def __init__(self, method: str, ranks: Sequence[int] = ()) -> None:
        """Let the clients, of these ranks by turns, train; with the hostile one, and without."""
        self.method, self._mixed = method, bool(ranks)
        self._config = load("tiny").resolve(method, [*RECIPE, f"adapter.ranks={[*ranks]}"])
        self._here = resident(server_view(self._config))
        self._ledger = Ledger(Path("unused"))  # nothing private is trained
        self._with = dict[tuple[str, int], Message]()
        self._without = dict[tuple[str, int], Message]()
        self.heard = self._play(self._with, lambda _, good: [good])
        self.alone = self._play(self._without, lambda *_: [])

    def strategy(self) -> LoraStrategy:
        """The rule as the recipe has it; one client is enough, and nobody evaluates."""
        strategy = strategy_for(self._config, self._here.model.scales())
        return replace(strategy, min_train_nodes=1, fraction_evaluate=0.0)

    def attack(self, mutator: Mutator) -> Tried | None:
        """Let the hostile client send this in each round; None if the rule cannot meet it."""
        strategy = self.strategy()
        layout = strategy.prepare(ArrayRecord(self._here.first))
        plans = [strategy.plan(number) for number in range(1, ROUNDS + 1)]
        if not any(mutator.applies(layout, plan) for plan in plans):
            return None

        def hostile(asked: Message, good: Message) -> Sequence[Message]:
            plan = plans[int(asked.metadata.group_id) - 1]
            if not mutator.applies(layout, plan):
                return []
            return mutator.sent(Upload(asked, good.content, layout, plan))

        taped, expected = self._without, self.alone
        if mutator.counts:
            taped, expected = self._with, self.heard
        try:
            found = self._play(taped, hostile)
        except Exception as error:  # the very thing that must not happen
            return Tried(self.method, mutator.name, f"{type(error).__name__}: {error}")
        return Tried(self.method, mutator.name, self._fault(mutator, found, expected))

    def _fault(self, mutator: Mutator, found: Played, expected: Played) -> str:
        """What the server did wrong."""
        for record in found.records[1:]:
            if not mutator.counts and HOSTILE in record.clients:
                return f"round {record.round}: accepted"
            said = [failure.reason for failure in record.failures if failure.client == HOSTILE]
            known = [mutator.reason]
            if mutator.frozen:  # where ranks differ, it is of another one than what came with it
                known += ["no reply", *(["expected"] if self._mixed else [])]
            if not any(reason in text for text in said for reason in known):
                return f"round {record.round}: it says {said}, not {mutator.reason!r}"
        if found.arrays != expected.arrays:
            return "another adapter than without it"
        return "" if found.memory == expected.memory else "another memory than without it"

    def _play(self, taped: dict[tuple[str, int], Message], hostile: Answer) -> Played:
        """A short run."""
        strategy, records = self.strategy(), list[RoundRecord]()
        grid = Staged(taped, hostile)
        with threads(1):
            done = strategy.start(
                grid,
                ArrayRecord(self._here.first),
                num_rounds=ROUNDS,
                train_config=client_config(self._config, self._here, [], self._ledger),
                on_round=lambda record, _: records.append(record),
            )
        arrays = {key: array.data for key, array in done.arrays.items()}
        memory = {key: _bytes(value) for key, value in strategy.memory.items()}
        return Played(arrays, memory, records)


def attacked(method: str, ranks: Sequence[int] = ()) -> list[Tried]:
    """One rule, with clients of these ranks by turns, against all mutators."""
    target = Target(method, ranks)
    silent = set(range(CLIENTS)) - set(target.heard.records[-1].clients)
    if silent:
        return [Tried(method, "none", f"good replies of clients {sorted(silent)} do not count")]
    tried = [target.attack(mutator) for mutator in MUTATORS]
    return [one for one in tried if one]


def uploads(size: Size) -> list[Fault]:
    """A line for each rule, and one more where it takes clients of several ranks."""
    lines = []
    for method in size.methods or METHODS:
        lines.append(_line(f"hostile uploads to {method}", attacked(method)))
        if takes_ranks(method):
            lines.append(
                _line(f"hostile uploads to {method}, ranks 2 and 4", attacked(method, RANKS))
            )
    return lines


def takes_ranks(method: str) -> bool:
    """Whether a rule takes clients of several ranks."""
    try:
        load("tiny").resolve(method, [f"adapter.ranks={[*RANKS]}"])
    except ConfigError:
        return False
    return True


def _line(name: str, tried: Sequence[Tried]) -> Fault:
    """What became of all mutators."""
    faults = [f"{one.mutator}: {one.fault}" for one in tried if one.fault]
    seen = "; ".join(faults) or "each refused and named, adapter and memory as without it"
    return Fault(name, len(tried), len(tried) - len(faults), seen)


def _bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's numbers."""
    return tensor.contiguous().numpy().tobytes()
