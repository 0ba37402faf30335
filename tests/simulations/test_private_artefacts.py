"""What leaves a private client and what a private run leaves on disk: that, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from safetensors import safe_open

from clients.client_app import app
from fedlora.config import RunConfig
from simulations.grid import InProcessGrid
from simulations.recipe import load
from simulations.results import TRACK
from simulations.server_app import serve
from strategies import METHODS
from tests.helpers import ScriptedGrid, bits

# Opacus warns of its own generator and of hooks that fire early
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PRIVATE = ("privacy.unit=example", "privacy.epsilon=4.0", "privacy.delta=1e-3")
FILES = {
    "config.toml",
    "environment.json",
    "rounds.jsonl",
    "summary.json",
    "privacy.json",
    "curves.png",
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    *(f"ledger/client-{client}.jsonl" for client in range(4)),
}


class Watching(InProcessGrid):
    """Keeps the training messages and what came back."""

    def __init__(self) -> None:
        super().__init__(app, 4)
        self.asked: dict[tuple[str, int], Message] = {}
        self.replied: dict[tuple[str, int], RecordDict] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As the grid does, with notes."""
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        for message, reply in zip(sent, replies, strict=True):
            if message.metadata.message_type == "train":
                where = (message.metadata.group_id, message.metadata.dst_node_id)
                self.asked[where], self.replied[where] = message, reply.content
        return replies


def private(method: str, *changes: str) -> RunConfig:
    return load("tiny").resolve(method, [*PRIVATE, *changes])


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watching, Path]:
    """A private run of the rule that computes most on the server."""
    grid, folder = Watching(), tmp_path_factory.mktemp("fair")
    serve(private("lora_fair"), grid, folder)
    return grid, folder


def test_a_client_sends_what_was_noised_and_what_the_statement_names(
    fair: tuple[Watching, Path],
) -> None:
    """A number more in the reply, computed from the examples, must be noticed."""
    grid, folder = fair
    uncovered = json.loads((folder / "privacy.json").read_text())["not_covered"]
    assert len(grid.replied) == 8
    for where, reply in grid.replied.items():
        assert set(reply) == {"arrays", "metrics", "reply"}
        assert set(reply["arrays"]) == set(grid.asked[where].content["arrays"])
        assert set(reply["metrics"]) == {"num-examples", "train_loss"}
        told = grid.asked[where].content["config"]["adapter"]  # what it started from
        assert dict(reply["reply"]) == {
            "client": where[1],
            "round": int(where[0]),
            "adapter": told,
        }
        sent, got = bits(grid.asked[where].content["arrays"]), bits(reply["arrays"])
        assert all(sent[key] != got[key] for key in sent)  # every tensor moved: all were noised
    assert any("number of examples" in line for line in uncovered)
    assert any("training losses" in line for line in uncovered)
    assert any("settings chosen" in line for line in uncovered)


def test_the_server_computes_from_the_uploads_alone(fair: tuple[Watching, Path]) -> None:
    """The same replies from nobody: a strategy without clients, data or model merges the same."""
    grid, folder = fair
    rule = METHODS["lora_fair"](min_available_nodes=1, settle=0.0, fraction_evaluate=0.0)
    first = grid.asked["1", 0].content["arrays"]
    played = ScriptedGrid(4, lambda node, sent: grid.replied[sent.metadata.group_id, node])
    result = rule.start(played, first, num_rounds=2)
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "numpy") as saved:
        assert set(saved.keys()) == set(result.arrays)
        for key, array in result.arrays.items():
            assert saved.get_tensor(key).tobytes() == array.numpy().tobytes(), key


@pytest.mark.parametrize("rng", ["simulation", "os"])
def test_a_run_leaves_no_gradient_no_examples_and_no_noise(tmp_path: Path, rng: str) -> None:
    grid = Watching()
    serve(private("fedavg", f"privacy.rng={rng}"), grid, tmp_path / "run")
    found = {p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.parent.name != TRACK}
    assert {str(p.relative_to(tmp_path / "run")) for p in found} == FILES
    with safe_open(tmp_path / "run/adapter/adapter_model.safetensors", "numpy") as saved:
        assert set(saved.keys()) == set(grid.asked["1", 0].content["arrays"])
    known = {"schema", "client", "round", "release", "sample_rate", "noise_multiplier", "steps"}
    for line in (tmp_path / "run/ledger/client-0.jsonl").read_text().splitlines():
        assert json.loads(line).keys() == known | {"mechanism", "relation"}
