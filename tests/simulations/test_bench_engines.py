"""The benches of our engine: both sides do the same, and each line says what was measured.

No test looks at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from flwr.clientapp import ClientApp

from clients.client_app import app as client_app
from fedlora.errors import ConfigError, FedloraError
from simulations import bench, bench_flower, bench_measured, bench_payload, bench_scale
from simulations.bench_measured import extra_megabytes, row
from simulations.bench_overhead import SUBJECTS, overhead
from simulations.bench_overhead import Round as Overhead
from simulations.bench_overhead import Subject as Engine
from simulations.bench_server import HEADED, PARTS, drawn, server
from simulations.bench_server import Subject as Adapters
from simulations.bench_side import Job, side
from simulations.grid import InProcessGrid
from strategies import METHODS, LoraFair

SMALL = Adapters(modules=3, width=24, rank=2, clients=4, part=2, descended=1, steps=5)
ENGINE = Engine("tiny_bert", clients=2, steps=2)


def quiet(text: str) -> None:
    """Nobody listens."""


def test_numbers_measured_elsewhere_make_a_row() -> None:
    found = row("a case", [1.0, 3.0, 2.0], [2.0, 2.0, 8.0], "MB", 0.4)
    assert (found.ours, found.peer, found.ratio, found.missed) == (2.0, 2.0, 0.5, True)
    assert (found.least, found.greatest, found.pairs, found.unit) == (0.25, 1.5, 3, "MB")
    assert bench.cells(found) == ["a case", "2 MB", "2 MB", "0.50", "0.4 (missed)"]
    small = dataclasses.replace(found, ratio=0.00123)
    assert bench.cells(small)[3] == "0.0012"


def test_memory_is_what_the_work_held_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(megabytes: int) -> None:
        torch.ones(megabytes * 250_000)

    hold(80)  # what was held before does not count
    assert 38 < extra_megabytes(lambda: hold(40)) < 60
    assert extra_megabytes(lambda: None) < 10
    monkeypatch.setattr(bench_measured, "CLEAR", bench_measured.CLEAR / "nothing")
    with pytest.raises(ConfigError, match="allowed: Linux"):
        extra_megabytes(lambda: None)


def test_every_rule_merges_the_same_uploads() -> None:
    uploads = drawn(SMALL)
    assert len(uploads.updates) == 4 and len(uploads.state.adapter.pairs) == 3
    assert uploads.megabytes == pytest.approx(3 * 2 * 24 * 2 * 4 / 1e6)
    for update, frozen in zip(uploads.updates, uploads.frozen, strict=True):
        for name, pair in update.adapter.pairs.items():
            assert frozen.adapter.pairs[name].A is uploads.state.adapter.pairs[name].A
            assert frozen.adapter.pairs[name].B is pair.B
            assert not torch.equal(pair.A, uploads.state.adapter.pairs[name].A)
    assert uploads.read() == uploads.merge(LoraFair()) == PARTS
    assert uploads.descend(1, 5) == pytest.approx(PARTS / 3 * 5 / 1000)


def test_a_part_is_some_layers_of_all_uploads_and_counts_as_that_much() -> None:
    uploads = drawn(SMALL)
    part = uploads.part(2)
    assert part.merge(LoraFair()) == pytest.approx(PARTS * 2 / 3)
    assert len(part.updates) == len(part.frozen) == 4
    for one in (part.state.adapter, *(update.adapter for update in part.updates)):
        assert list(one.pairs) == list(uploads.state.adapter.pairs)[:2]
    assert part.part(1).merge(LoraFair()) == pytest.approx(PARTS / 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_is_timed_on_what_its_clients_send(method: str) -> None:
    uploads, rule = drawn(SMALL), METHODS[method]()
    frozen = "A" not in rule.plan(1).train
    for update in uploads.sent(rule):
        for name, pair in update.adapter.pairs.items():
            assert (pair.A is uploads.state.adapter.pairs[name].A) == frozen


@pytest.mark.slow
def test_the_servers_lines() -> None:
    rows = {found.case: found for found in server(1, quiet, SMALL)}
    assert list(rows) == [
        "FedAvg over reading once",
        "FFA-LoRA over reading once",
        "LoRA-FAIR over reading once",
        "LoRA-FAIR over FedAvg",
        "aggregation error of FFA-LoRA over its merge",
        "aggregation error of LoRA-FAIR over its merge",
        "LoRA-FAIR over SGD (1 of 3 layers, 5 steps, scaled)",
        *(f"{name} over FedAvg (2 of 3 layers, scaled)" for name in METHODS if name not in HEADED),
        *(f"memory of {HEADED.get(name, name)} over one upload" for name in METHODS),
    ]
    assert rows["LoRA-FAIR over FedAvg"].allowed == 2.0
    assert rows["LoRA-FAIR over SGD (1 of 3 layers, 5 steps, scaled)"].allowed == 1 / 500
    assert all(found.pairs == 1 for found in rows.values())
    full = Adapters()
    assert (full.modules, full.width, full.rank, full.clients) == (64, 4096, 16, 20)


def test_the_bare_loop_trains_what_our_engine_trains() -> None:
    """Bit for bit, so both did the same steps on the same rows with the same dropout."""
    ready = Overhead.of(ENGINE)
    replies = ready.replies()
    for client, reply in enumerate(replies):
        ours = reply.content.array_records["arrays"].to_torch_state_dict()
        ready.here.model.module.train()
        for name, bare in zip(ours, ready.bare(client), strict=True):
            assert torch.equal(ours[name], bare), name
            assert not torch.equal(bare, ready.here.first[name])
    assert ready.ours() == ready.peer() == 4


def test_the_engines_lines() -> None:
    (found,) = overhead(1, quiet, [ENGINE])
    assert (found.case, found.allowed) == ("tiny_bert: 2 clients over a bare loop", 1.05)
    assert [subject.model for subject in SUBJECTS] == ["minilm", "tiny_bert"]


class Held:
    """An engine in this process, in the place of one in a process of its own."""

    def __init__(self, app: ClientApp, job: Job) -> None:
        module = {"bench_scale": bench_scale.rounds, "bench_flower": bench_flower.training}
        self._grid = InProcessGrid(app, job.clients)
        self._do = module[job.rounds.split(".")[1].split(":")[0]](job)
        self._number, self.first_seconds = 0, 4.0
        self.asked: list[int] = []

    def round(self) -> float:
        self._do(self._grid, self._number)
        self._number += 1
        return 0.5

    def own_megabytes(self) -> float:
        return 100.0 + self._number


def test_the_lines_of_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, Held] = {}

    @contextmanager
    def here(engine: str, job: Job) -> Iterator[Held]:
        assert engine == "ours"
        held[job.clients] = Held(bench_scale.app, job)
        yield held[job.clients]

    monkeypatch.setattr(bench_scale, "side", here)
    job = dataclasses.replace(bench_scale.JOB, asked=3)
    rows = bench_scale.scale(2, quiet, job, clients=(3, 6, 12), turn=2)
    assert [found.case for found in rows] == [
        "a client of 6 over one of 3",
        "a client of 12 over one of 3",
        "12: start and first round over 20 s",
        "12: server process over 2000 MB",
        "12: its growth a round over 1 MB",
    ]
    assert [found.allowed for found in rows] == [1.1, 1.1, 1.0, 1.0, 1.0]
    assert rows[0].ours == pytest.approx(500 / 3)  # milliseconds for each client and round
    assert [found.ours for found in rows[2:]] == [4.0, 106.0, 1.0]
    counts = [sum("seen" in c.state for c in one._grid.contexts.values()) for one in held.values()]
    assert counts[0] == 3 and 3 < counts[2] <= 12  # everybody, and whoever was drawn
    assert (bench_scale.CLIENTS, bench_scale.JOB.asked) == ((100, 1000, 10000), 100)


def test_the_lines_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int]] = []

    @contextmanager
    def here(engine: str, job: Job) -> Iterator[Held]:
        started.append((engine, job.pack))
        yield Held(client_app, job)

    monkeypatch.setattr(bench_flower, "side", here)
    job = dataclasses.replace(bench_flower.JOB, clients=4, asked=4, steps=1)
    rows = bench_flower.flower(2, quiet, job, pack=2)
    assert [found.case for found in rows] == [
        "4 clients, packs of 2: round",
        "4 clients, one by one: round",
        "4 clients: first result (2 starts)",
        "4 clients: first result (2 starts) over 12 s",
    ]
    assert [found.allowed for found in rows] == [0.1, None, None, 1.0]
    assert [found.pairs for found in rows] == [2, 2, 2, 2]
    assert started == [("ours", 2), ("flower", 1), ("ours", 2), ("flower", 1), ("ours", 1)]


@pytest.mark.ray
@pytest.mark.flower
@pytest.mark.slow
def test_payload_with_both_engines_in_processes_of_their_own() -> None:
    job = dataclasses.replace(bench_payload.JOB, clients=2, asked=2, workers=1, megabytes=0.5)
    rows = bench_payload.payload(1, quiet, job)
    assert [found.case for found in rows] == [
        "2 x 0.5 MB, all replies held: a round over Flower's",
        "2 x 0.5 MB, all replies held: a round over 1 s",
        "2 x 0.5 MB, all replies held: memory over Flower's",
        "2 x 0.5 MB, all replies held: memory over 200 MB",
        "2 x 0.5 MB, one reply at a time: a round over 1 s",
        "2 x 0.5 MB, one reply at a time: memory over 200 MB",
    ]
    assert [found.allowed for found in rows] == [None, 1.0, None, 1.0, 1.0, 1.0]
    assert all(found.ours > 0 and found.peer > 0 for found in (*rows[:2], rows[4]))
    assert (bench_payload.JOB.clients, bench_payload.JOB.megabytes) == (20, 32.0)


@pytest.mark.ray
def test_an_engine_that_fails_says_why() -> None:
    job = dataclasses.replace(bench_payload.JOB, clients=1, rounds="simulations.bench_payload:no")
    with pytest.raises(FedloraError, match=r"the engine failed: .*no"), side("ours", job):
        pass
