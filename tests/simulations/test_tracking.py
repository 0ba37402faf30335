"""Trackers: what they are told, once each, and that a run outlives them."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.privacy import PrivacyEvent, epsilon
from fedlora.rounds import Failure, OverClients, OwnRows, RoundRecord
from simulations.chaos_runs import config, tree
from simulations.cli import main
from simulations.spending import spent
from simulations.tracking import tracking
from simulations.tracking.scalars import scalars
from tests.simulations.resumed import die, run

OFF = "launch.track=[]"


class Fails:
    """A tracker that fails where it is told to."""

    def __init__(self, where: str) -> None:
        self.where, self.told = where, -1

    def __call__(self, place: Path, config: RunConfig, following: int) -> Fails:
        self.fail("open")
        return self

    def add(self, round: int, values: Mapping[str, float]) -> None:
        self.fail(f"round {round}")

    def close(self, status: str) -> None:
        self.fail(status)

    def fail(self, where: str) -> None:
        if where == self.where:
            raise OSError(f"no\nroom in {where}")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by name."""
    library = "tensorboard.backend.event_processing.event_accumulator"
    found = pytest.importorskip(library, reason="no TensorBoard: fedlora[tensorboard]")
    shown = found.EventAccumulator(str(folder / "track"), size_guidance={"scalars": 0})
    shown.Reload()
    names = shown.Tags()["scalars"]
    return {name: [(one.step, one.value) for one in shown.Scalars(name)] for name in names}


def written(folder: Path) -> list[int]:
    """Steps of all events that hold numbers, in all files of a run."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    return [
        event.step
        for path in sorted((folder / "track").glob("events.*"))
        for event in loader.EventFileLoader(str(path)).Load()
        if event.HasField("summary")
        for value in event.summary.value
        if value.tag == "seconds/round"
    ]


def test_a_record_is_told_by_names() -> None:
    over = OverClients(0.5, 0.25, 0.125)
    record = RoundRecord(
        2,
        loss=1.5,
        accuracy=0.75,
        groups={"a": 0.5, "b": 1.0},
        aggregation_error=0.25,
        aggregation_error_by_layer={"query": 0.5},
        bytes_up=8,
        seconds=3.0,
        clients=(0, 1),
        failures=(Failure(2, "train", "late"),),
        own_rows={"global": OwnRows(2, over, over)},
    )
    assert scalars(record, 4.0) == {
        "accuracy/all": 0.75,
        "accuracy/mean": 0.75,
        "accuracy/worst": 0.5,
        "accuracy/group/a": 0.5,
        "accuracy/group/b": 1.0,
        "loss/held_out": 1.5,
        "epsilon": 4.0,
        "aggregation_error/all": 0.25,
        "aggregation_error/layer/query": 0.5,
        "bytes/up": 8.0,
        "bytes/down": 0.0,
        "seconds/round": 3.0,
        "clients/merged": 2.0,
        "clients/failures": 1.0,
        **{
            f"own_rows/global/{what}/{name}": value
            for what in ("accuracy", "loss")
            for name, value in (("mean", 0.5), ("worst", 0.25), ("spread", 0.125))
        },
    }


def test_epsilon_is_what_the_ledger_holds(tmp_path: Path) -> None:
    """Of the client that spent most; nothing where it charges elsewhere, or is not private."""
    private = config("privacy.unit=example", "privacy.noise_multiplier=1.0")
    assert spent(private, tmp_path) is None
    event = PrivacyEvent(0.1, 1.0, 2)
    for client, round in ((0, 1), (1, 1), (1, 2)):
        Ledger(tmp_path / "ledger").charge(client, event, round, f"release {client} {round}")
    assert spent(private, tmp_path) == epsilon([event, event], private.privacy.delta, "rdp")
    assert spent(config(), tmp_path) is None


def uninstall(patch: pytest.MonkeyPatch) -> None:
    """Let no tracker be found."""
    find = importlib.util.find_spec
    patch.setattr(
        importlib.util, "find_spec", lambda name: None if name in tracking.TRACKERS else find(name)
    )


def test_without_a_library_nothing_is_said_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall(monkeypatch)
    assert run(tmp_path / "run", "rounds=1") == []
    assert not (tmp_path / "run" / "track").exists()


def test_a_library_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninstall(monkeypatch)
    out = str(tmp_path / "run")
    assert main(["run", "tiny", "--track", "tensorboard", "--out", out]) == 2
    assert capsys.readouterr().err == (
        "fedlora: launch.track: found 'tensorboard', and the package tensorboard is not "
        "installed; install Fedlora with its extra: pip install 'fedlora[tensorboard]'\n"
    )
    assert not [*(tmp_path / "run").glob("*")]
    with pytest.raises(ConfigError, match=r"launch.track.0: found 'tensorbord', allowed: 'auto'"):
        config("launch.track=['tensorbord']")


def test_tensorboard_shows_what_the_records_say(tmp_path: Path) -> None:
    run(tmp_path / "run", "rounds=2")
    found, lines = series(tmp_path / "run"), records(tmp_path / "run")
    for name, key in (
        ("accuracy/all", "accuracy"),
        ("loss/held_out", "loss"),
        ("loss/train", "train_loss"),
        ("aggregation_error/all", "aggregation_error"),
        ("bytes/up", "bytes_up"),
    ):
        wanted = [(line["round"], line[key]) for line in lines if line[key] is not None]
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert {name for name in found if "/group/" in name} == {
        "accuracy/group/long",
        "accuracy/group/short",
    }
    assert sum("/layer/" in name for name in found) == 4


@pytest.mark.parametrize(
    ("fault", "again"), [("manifest-before-rename@2", [2]), ("after-commit@2", [])]
)
def test_a_run_that_goes_on_tells_no_round_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, again: list[int]
) -> None:
    """The round that died uncommitted is in the file twice, and is shown once: as done last."""
    die(monkeypatch, fault, tmp_path / "run", "rounds=3")
    run(tmp_path / "run", "rounds=3", resume=True)
    seconds = [line["seconds"] for line in records(tmp_path / "run")]
    found = series(tmp_path / "run")["seconds/round"]
    assert found == [(step, pytest.approx(one, rel=1e-6)) for step, one in enumerate(seconds)]
    assert sorted((Counter(written(tmp_path / "run")) - Counter(range(4))).elements()) == again
    run(tmp_path / "other", "rounds=3", OFF)
    assert not (tmp_path / "other" / "track").exists()
    both = [tree(tmp_path / name) for name in ("run", "other")]
    for one in both:
        one.pop("config.toml")  # which says who is told
    assert both[0] == both[1]


def test_who_is_told_may_change_and_hears_of_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(monkeypatch, "after-commit@1", tmp_path / "run", "rounds=2", OFF)
    run(tmp_path / "run", "rounds=2", "launch.track=['auto']", resume=True)
    assert [step for step, _ in series(tmp_path / "run")["loss/held_out"]] == [0, 1, 2]


@pytest.mark.parametrize("where", ["open", "round 1", "finished"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kind = tracking.Kind("torch", Fails(where))
    monkeypatch.setattr(tracking, "TRACKERS", {"wandb": kind})
    said = run(tmp_path / "run", "rounds=1", "launch.track=['wandb']")
    assert said == [f"wandb: no room in {where}; the run goes on without it"]
    assert len(records(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_fails_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = tracking.Kind("torch", Fails("failed"))
    monkeypatch.setattr(tracking, "TRACKERS", {"wandb": kind})
    said = die(monkeypatch, "after-commit@1", tmp_path / "run", "launch.track=['wandb']")
    assert said == ["wandb: no room in failed; the run goes on without it"]


def framed(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format after seven bytes of its own."""
    at, part = 7, b""
    while at + 7 <= len(data):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield part
            part = b""


def offline(folder: Path) -> list[list[tuple[int, float]]]:
    """Steps and losses in each of W&B's files of a run, in the order of their making."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((folder / "track").glob("wandb/offline-run-*/*.wandb")):
        told = []
        for data in framed(path.read_bytes()):
            items = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in Record.FromString(data).history.item
            }
            if "loss/held_out" in items:
                told.append((int(items["_step"]), float(items["loss/held_out"])))
        found.append(told)
    return found


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a run that went on tells all rounds again, since it cannot ask what is known."""
    pytest.importorskip("wandb", reason="no W&B: fedlora[wandb]").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    track = "launch.track=['wandb']"
    die(monkeypatch, "after-commit@1", tmp_path / "run", "rounds=2", track)
    assert run(tmp_path / "run", "rounds=2", track, resume=True)
    losses = [*enumerate(line["loss"] for line in records(tmp_path / "run"))]
    assert offline(tmp_path / "run") == [losses[:2], losses]


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="no W&B: fedlora[wandb]").teardown()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (said,) = run(tmp_path / "run", "rounds=1", "launch.track=['wandb']")
    assert said.startswith("wandb: ") and said.endswith("; the run goes on without it")
    assert len(records(tmp_path / "run")) == 2


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds once each, although one was done again; under names that MLflow takes."""
    mlflow = pytest.importorskip("mlflow", reason="no MLflow: fedlora[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    track = "launch.track=['mlflow']"
    die(monkeypatch, "manifest-before-rename@2", tmp_path / "run", "rounds=2", track)
    run_id, client = (tmp_path / "run" / "track" / "mlflow-run").read_text(), mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FAILED"
    run(tmp_path / "run", "rounds=2", track, resume=True)
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["train.learning_rate"] == "0.005"
    told = [(one.step, one.value) for one in client.get_metric_history(run_id, "loss/held_out")]
    assert told == [*enumerate(line["loss"] for line in records(tmp_path / "run"))]
    assert "accuracy/group/short" in found.data.metrics
