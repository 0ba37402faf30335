"""The server app as a deployment runs it: what it prints, how long it waits, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from clients.client_app import app as client_app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError
from simulations.deploy.control import Control
from simulations.deploy.submitting import carry_through
from simulations.deploy.telling import MARK, Listener
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.progress import Progress
from simulations.recipe import load
from simulations.server_app import app as server_app


def serve(config: RunConfig, folder: Path, nodes: int, **more: str | float | bool) -> None:
    """As Flower does it for a submitted app."""
    run_config = {"config": config.model_dump_json(), "folder": str(folder), **more}
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config)
    grid = InProcessGrid(client_app, nodes)
    try:
        server_app(grid, context)
    finally:
        grid.close()


def test_a_finished_run_travels_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    config = load("tiny").resolve(None, ["rounds=1", "train.steps=1"])
    serve(config, there, nodes=4, tell="files")
    listener = Listener(Progress(), here)
    listener.hear(capsys.readouterr().out)
    assert (listener.place, listener.done, listener.sent) == (str(there), True, True)
    written = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
    assert {Path("summary.json"), Path("adapter/adapter_model.safetensors")} <= written
    for path in written:
        assert (here / path).read_bytes() == (there / path).read_bytes()

    serve(config, there, nodes=4, tell="files", resume=True)  # results were lost on the way
    listener = Listener(Progress(), tmp_path / "again")
    listener.hear(capsys.readouterr().out)
    assert listener.sent
    for path in written:
        assert (tmp_path / "again" / path).read_bytes() == (here / path).read_bytes()


def test_nodes_that_do_not_come_are_not_waited_for_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load("tiny").resolve(None, ["rounds=1"])
    with pytest.raises(FedloraError, match=r"3 nodes connected after \d s, 4 needed"):
        serve(config, tmp_path / "run", nodes=3, wait=0.1, tell="rounds")
    listener = Listener(Progress())
    listener.hear(capsys.readouterr().out)
    assert "3 nodes connected after" in listener.refused


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    config = load("tiny").resolve(None, ["rounds=1", "train.steps=1"])
    serve(config, tmp_path / "run", nodes=4)
    other = load("tiny").resolve(None, ["rounds=1", "train.steps=2"])
    with pytest.raises(ConfigError, match="steps: found 2, allowed: 1"):
        serve(other, tmp_path / "run", nodes=4, resume=True)


class Flaky(Control):
    """A SuperLink whose runs end as they are told to, each after its log."""

    def __init__(self, *ends: tuple[str, str]) -> None:
        self.ends = list(ends)
        self.begun: list[object] = []

    def start(self, bundle: bytes, run_config: Mapping[str, str | int | float | bool]) -> int:
        self.begun.append(run_config["resume"])
        return len(self.begun)

    def logs(self, run: int) -> Iterator[str]:
        yield self.ends[run - 1][1]

    def outcome(self, run: int) -> tuple[str, str]:
        return self.ends[run - 1][0], "a message\nwas lost"


PLACE = f'{MARK}{{"kind": "folder", "path": "/there"}}\n'
OURS = f'{PLACE}{MARK}{{"kind": "refused", "text": "rank: found 0"}}\n'
NEW: dict[str, str | int | float | bool] = {"folder": "/there", "resume": False}


def test_a_run_that_flower_lost_is_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Flaky(("failed", PLACE), ("failed", PLACE), ("completed", PLACE))
    assert carry_through(asked, NEW, Progress(), None).place == "/there"
    assert asked.begun == [False, True, True]


@pytest.mark.parametrize(
    ("ends", "times", "said"),
    [
        ([("failed", PLACE)] * 3, 3, "run 3: failed: a message"),
        ([("failed", OURS)], 1, "run 1: rank: found 0"),
        ([("failed", "nothing had begun")], 1, "run 1: failed"),
        ([("stopped", PLACE)], 1, "run 1: stopped"),
    ],
)
def test_what_another_try_would_not_mend_is_not_tried(
    ends: list[tuple[str, str]], times: int, said: str
) -> None:
    asked = Flaky(*ends)
    with pytest.raises(FedloraError, match=said):
        carry_through(asked, NEW, Progress(), None)
    assert len(asked.begun) == times
