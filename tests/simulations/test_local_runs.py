"""Runs on rows that are the clients' own: in simulation, and where the server has none of them."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from clients import client_app, own_rows
from clients.resident import resident
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, DataError
from fedlora.ledger import Ledger
from fedlora.tasks.local import Files
from simulations import launch
from simulations.answers import answer
from simulations.cli import main
from simulations.dry_run import dry_run
from simulations.grid import InProcessGrid
from simulations.progress import Progress
from simulations.recipe import load
from simulations.server_app import serve
from tests.simulations.own_files import rows_of, tiny_as_files, tiny_of_own, write_csv
from tests.test_documents import ROOT, blocks, console

FIRST = 1000  # node id of client 0: on Flower's runtime, no node's id is its client's number
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3", "rounds=1")


Bits = tuple[list[dict[str, object]], bytes]


def bits(folder: Path) -> Bits:
    """Everything a run says but its times."""
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def ran(config: RunConfig, folder: Path) -> Bits:
    return bits(launch.run(config, folder, Progress()))


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The run of ``tiny`` as it is."""
    return ran(load("tiny").resolve(None, []), tmp_path_factory.mktemp("run") / "built-in")


class Nodes(Grid):
    """Nodes of a deployment, each with its own rows; not one of our grids.

    Attributes:
        read: which clients' places were opened while which client's message was worked on.
    """

    def __init__(self, folder: Path, clients: int = 4, **more: str) -> None:
        self.inner = InProcessGrid(client_app.app, clients)
        self.asked: list[str] = []
        for client, context in self.inner.contexts.items():
            places = {"data": f"{folder}/{client}.csv", "held-out": f"{folder}/{client}-test.csv"}
            context.node_config.update(places)
            context.node_config.update({k: v.format(client=client) for k, v in more.items()})

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            self.asked.append(message.metadata.message_type)
            client = message.metadata.dst_node_id - FIRST
            with at_work(client):
                replies.append(answer(client_app.app, message, self.inner.contexts[client]))
        return replies

    def get_node_ids(self) -> list[int]:
        return [FIRST + client for client in self.inner.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def create_message(self, *arguments: object, **more: object) -> Message:
        raise NotImplementedError

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError


WORKING: list[int] = []  # the client whose message is worked on, if any
READ: list[tuple[Sequence[int], str]] = []  # who read what


@contextmanager
def at_work(client: int) -> Iterator[None]:
    WORKING.append(client)
    try:
        yield
    finally:
        WORKING.clear()


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads which place."""
    READ.clear()
    read = Files._read

    def watching(self: Files, path: Path, client: int):  # type: ignore[no-untyped-def]
        READ.append((tuple(WORKING), path.name))
        return read(self, path, client)

    monkeypatch.setattr(Files, "_read", watching)
    from clients import resident as module

    module._resident.cache_clear()


def deployed(config: RunConfig, grid: Nodes, folder: Path) -> Bits:
    """The run of a server that is told nothing of places of rows."""
    folder.mkdir()
    serve(config, grid, folder)
    return bits(folder)


def placeless(*overrides: str) -> RunConfig:
    """The recipe as a deployment has it: ``held_out`` is told by nodes alone."""
    own = ("clients.split=own", "task.name=local", 'task.options.labels=["negative", "positive"]')
    more = ("task.options.group=kind", "task.options.validation=0")
    return load("tiny").resolve(None, [*own, *more, *overrides])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_same_rows_in_files_are_the_same_run_bit_for_bit(
    tmp_path: Path, built_in: Bits, kind: str
) -> None:
    assert ran(tiny_of_own(tmp_path, kind=kind), tmp_path / "own") == built_in


def test_a_deployment_is_the_simulation_bit_for_bit(tmp_path: Path, built_in: Bits) -> None:
    """The server reads no rows, and each node its own alone."""
    tiny_as_files(tmp_path)
    found = deployed(placeless(), grid := Nodes(tmp_path), tmp_path / "deployed")
    assert found == built_in
    assert {who for who, _ in READ} == {(0,), (1,), (2,), (3,)}
    assert all(name.startswith(str(who[0])) for who, name in READ)
    assert "query" not in grid.asked


def test_the_same_recipe_serves_both(tmp_path: Path, built_in: Bits) -> None:
    """What it says of places means nothing to nodes that name their own."""
    config = tiny_of_own(tmp_path)
    elsewhere = config.task.options | {"path": "/no/{client}", "held_out": "/no/such/{client}"}
    task = config.task.model_copy(update={"options": elsewhere})
    moved = config.model_copy(update={"task": task})
    assert deployed(moved, Nodes(tmp_path), tmp_path / "deployed") == built_in


def test_private_counts_are_asked_for_and_ledgers_stay_where_nodes_say(tmp_path: Path) -> None:
    config = tiny_of_own(tmp_path, *PRIVATE)
    simulated = ran(config, tmp_path / "simulated")
    READ.clear()
    ledgers = tmp_path / "ledgers"
    nodes = Nodes(tmp_path, ledger=f"{ledgers}/node-{{client}}")
    assert deployed(config, nodes, tmp_path / "deployed") == simulated
    assert nodes.asked[:4] == ["query"] * 4 and "query" not in nodes.asked[4:]
    assert all(who and name.startswith(str(who[0])) for who, name in READ)
    kept = [Ledger(ledgers / f"node-{client}") for client in range(4)]
    assert [ledger.clients() for ledger in kept] == [[client] for client in range(4)]
    assert not (tmp_path / "deployed" / "ledger").exists()

    spent, planned = (
        json.loads((tmp_path / name / "privacy.json").read_text())
        for name in ("simulated", "deployed")
    )
    assert [row["examples"] for row in planned["clients"]] == [
        row["examples"] for row in spent["clients"]
    ]
    assert planned["epsilon"] == planned["planned"] == pytest.approx(spent["epsilon"])
    assert planned["spent"].startswith("not known to the server")
    assert "told to the server before round 1" in planned["not_covered"][-1]
    assert spent["spent"] == "as the ledgers say"
    assert not any("told to the server" in line for line in spent["not_covered"])
    assert main(["privacy", "report", str(tmp_path / "deployed")]) == 0


def test_ledgers_at_the_server_are_read(tmp_path: Path) -> None:
    """As on Flower's simulation, where nodes have no place of their own."""
    config = tiny_of_own(tmp_path, *PRIVATE)
    deployed(config, Nodes(tmp_path), tmp_path / "deployed")
    found = json.loads((tmp_path / "deployed" / "privacy.json").read_text())
    assert found["spent"] == "as the ledgers say"
    assert [row["steps"] for row in found["clients"]] == [5] * 4


def test_whole_clients_are_private_without_any_count(tmp_path: Path) -> None:
    private = (
        "privacy.unit=client",
        "privacy.noise_multiplier=1.0",
        "privacy.delta=0.1",
        "rounds=1",
    )
    config = tiny_of_own(tmp_path, *private)
    grid = Nodes(tmp_path)
    simulated = ran(config, tmp_path / "simulated")
    assert deployed(config, grid, tmp_path / "deployed") == simulated
    assert "query" not in grid.asked
    found = json.loads((tmp_path / "deployed" / "privacy.json").read_text())
    assert {row["examples"] for row in found["clients"]} == {None}


def test_a_node_that_does_not_tell_its_count_ends_a_private_run(tmp_path: Path) -> None:
    config = tiny_of_own(tmp_path, *PRIVATE)
    nodes = Nodes(tmp_path)
    (tmp_path / "2.csv").write_text("text,label,kind\nquite secret,nothing,short\n")
    with pytest.raises(ConfigError, match=r"client\(s\) 2 did not tell their number") as caught:
        deployed(config, nodes, tmp_path / "deployed")
    assert "rows cannot be read (line 2)" in str(caught.value)
    assert "secret" not in str(caught.value) and "nothing" not in str(caught.value)


def test_a_client_whose_rows_are_broken_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The wire says whose they are and where; the node's own log says what is wrong."""
    tiny_as_files(tmp_path)
    nodes = Nodes(tmp_path)
    with (tmp_path / "1.csv").open("a") as file:
        file.write("perhaps,quite secret,short,row\n")
    with caplog.at_level(logging.ERROR, "fedlora"):
        records, _ = deployed(placeless(), nodes, tmp_path / "deployed")
    reasons = {failure["reason"] for record in records for failure in record["failures"]}
    assert all("client 1: its rows cannot be read (line " in reason for reason in reasons)
    assert not any("secret" in reason or "perhaps" in reason for reason in reasons)
    assert records[1]["clients"] == [0, 2, 3]
    assert "found 'perhaps', allowed: negative, positive" in caplog.text


def test_a_simulation_says_all_that_is_wrong_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_of_own(tmp_path)
    with (tmp_path / "1.csv").open("a") as file:
        file.write("perhaps,quite late,short,row\n")
    with pytest.raises(DataError, match=r"1\.csv, line \d+: found 'perhaps', allowed: negative"):
        launch.run(config, tmp_path / "run", Progress())
    assert not (tmp_path / "run" / "config.toml").exists()


def test_rows_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    """As a node's rows may between two runs of a process that stays."""
    config = tiny_of_own(tmp_path)
    here = resident(config.client())
    before, digest = len(here.parts[0]), here.rows(0).digest
    rows = [
        {"label": "positive", "text": f"one more {k}", "kind": "short", "row": ""} for k in (1, 2)
    ]
    more = here.task_of(0)
    write_csv(tmp_path / "0.csv", [*rows_of(more, more.train), *rows])
    assert len(here.parts[0]) == before + 2
    assert here.rows(0).digest != digest
    assert len(here.rows(0)) == before + 2


def test_no_more_clients_rows_than_are_kept_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_rows, "KEPT", 2)
    here = resident(tiny_of_own(tmp_path).client())
    for client in (0, 1, 2, 2, 0):
        here.task_of(client)
    assert [name for _, name in READ if "test" not in name] == [f"{k}.csv" for k in (0, 1, 2, 0)]


def test_too_few_rows_and_relative_places(tmp_path: Path) -> None:
    config = tiny_of_own(tmp_path, "clients.min_examples=10000")
    with pytest.raises(ConfigError, match=r"client 0: found \d+ row\(s\) to train on, allowed: at"):
        launch.run(config, tmp_path / "run", Progress())
    nodes = Nodes(tmp_path, data="here/{client}.csv")
    records, _ = deployed(placeless(), nodes, tmp_path / "deployed")
    assert "node config: data: found 'here/0.csv', allowed: an absolute path" in str(records)


def test_own_rows_measure_what_is_personal_and_evaluate_on_every_client(tmp_path: Path) -> None:
    personal = ("evaluate.personal=true", "evaluate.fine_tune_steps=2", "rounds=1")
    records, _ = ran(tiny_of_own(tmp_path, *personal), tmp_path / "own")
    built_in, _ = ran(load("tiny").resolve(None, list(personal)), tmp_path / "built-in")
    assert records == built_in
    assert records[-1]["own_rows"]


def test_each_client_is_a_group_and_many_clients_all_measure(tmp_path: Path) -> None:
    overrides = tiny_as_files(tmp_path, clients=18)
    config = load("tiny").resolve(None, [*overrides, "task.options.group=", "rounds=1"])
    records, _ = ran(config, tmp_path / "own")
    assert set(records[-1]["groups"]) == {f"client-{client}" for client in range(18)}


def test_a_backdoor_needs_held_out_rows_in_one_place(tmp_path: Path) -> None:
    attack = ("clients.attackers=1", "clients.attack=backdoor")
    with pytest.raises(ConfigError, match=r"clients\.attack: found 'backdoor', allowed: with task"):
        launch.run(tiny_of_own(tmp_path, *attack), tmp_path / "run", Progress())


def test_commands_know_rows_of_clients_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for override in tiny_as_files(tmp_path) for word in ("--set", override)]
    assert main(["list", "tasks"]) == 0
    assert re.search("^local +Each client's own rows", capsys.readouterr().out, re.MULTILINE)
    assert main(["list", "tasks", "--partition", "tiny", "--json", *sets]) == 0
    dealt = json.loads(capsys.readouterr().out)
    assert main(["list", "tasks", "--partition", "tiny", "--json"]) == 0
    built_in = json.loads(capsys.readouterr().out)
    assert [row["examples"] for row in dealt] == [row["examples"] for row in built_in]
    assert [row["labels"] for row in dealt] == [row["labels"] for row in built_in]
    found = dry_run(tiny_of_own(tmp_path))
    assert found.timing is not None and found.timing.evaluate > 0
    assert found.examples == dry_run(load("tiny").resolve(None, [])).examples
    private = [word for override in PRIVATE for word in ("--set", override)]
    assert main(["privacy", "plan", "tiny", *sets, *private]) == 0


def test_the_readmes_recipe_and_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe,) = [block for block in blocks(ROOT / "README.md", "toml") if '"local"' in block]
    commands = [line for line in console(ROOT / "README.md") if "own.toml" in line]
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text(recipe, encoding="utf-8")
    Path("rows").mkdir()
    config = load("own.toml").resolve(None, [])
    for client in range(config.clients.number):
        rows = [{"text": f"so good {k}", "label": "positive"} for k in range(5 + client)]
        write_csv(Path(f"rows/{client}.csv"), [*rows, {"text": "bad", "label": "negative"}])
    assert [main(shlex.split(command)[1:]) for command in commands] == [0, 0]
    assert [client.name for client in Path("runs").iterdir()] == ["own-rows"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_in_process_and_ray_agree_bit_for_bit(tmp_path: Path) -> None:
    ray = tiny_of_own(tmp_path, "launch.backend=ray", "launch.workers=2")
    assert ran(ray, tmp_path / "ray") == ran(tiny_of_own(tmp_path), tmp_path / "here")
