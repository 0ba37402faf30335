"""What a server app tells whoever submitted it, and the app that is submitted."""

from __future__ import annotations

import io
import json
import tomllib
import zipfile
from pathlib import Path

import pytest

from fedlora.errors import FedloraError
from fedlora.rounds import RoundRecord
from simulations import launch
from simulations.deploy import telling
from simulations.deploy.bundle import COMPONENTS, RUN_CONFIG, bundle
from simulations.deploy.telling import MARK, Listener, Told
from simulations.progress import Progress
from simulations.recipe import load
from simulations.resuming import alone

ROOT = Path(__file__).parent.parent.parent


class Noted(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def run_started(self, title: str, rounds: int) -> None:
        self.heard.append((title, rounds))

    def round_done(self, record: RoundRecord) -> None:
        self.heard.append(record.as_json())

    def note(self, text: str) -> None:
        self.heard.append(text)

    def run_done(self) -> None:
        self.heard.append("done")


def test_rounds_arrive_as_they_were_told(tmp_path: Path) -> None:
    """A whole run's events, in pieces as a log has them, among other programs' lines."""
    direct, printed = Noted(), io.StringIO()
    config = load("tiny").resolve(None, ["rounds=1"])
    launch.run(config, tmp_path / "run", direct)
    told = Told(printed)
    told.run_started(*direct.heard[0])  # type: ignore[misc]
    for record in direct.heard[1:3]:
        told.round_done(RoundRecord.from_json(record))  # type: ignore[arg-type]
    told.run_done()
    log = "INFO: something\n" + printed.getvalue().replace("\n", "\nWARNING: else\n")
    heard = Noted()
    listener = Listener(heard)
    assert not listener.done
    for start in range(0, len(log), 7):
        listener.hear(log[start : start + 7])
    assert heard.heard == direct.heard
    assert listener.done


def test_files_come_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "PIECE", 1000)
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "adapter").mkdir(parents=True)
    contents = {"summary.json": b"{}", "empty": b"", "adapter/weights": bytes(range(256)) * 10}
    for name, data in contents.items():
        (there / name).write_bytes(data)
    printed = io.StringIO()
    Told(printed, breath=0.0).send(there)
    listener, text = Listener(Progress(), here), printed.getvalue()
    listener.hear(text[: text.rindex(MARK)])
    assert not listener.sent
    listener.hear(text[text.rindex(MARK) :])
    assert listener.sent
    assert {
        str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()
    } == contents


def test_large_files_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "LARGEST_MEGABYTES", 0)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "adapter").write_bytes(b"1")
    printed, heard = io.StringIO(), Noted()
    Told(printed).send(tmp_path / "there")
    Listener(heard, tmp_path / "here").hear(printed.getvalue())
    (line,) = heard.heard
    assert "copy it by hand" in str(line)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_files_land_inside_their_folder(tmp_path: Path, name: str) -> None:
    event = json.dumps({"kind": "file", "name": name, "start": 0, "data": ""})
    with pytest.raises(FedloraError, match=r"results: found a file .*, allowed: inside"):
        Listener(Progress(), tmp_path / "here").hear(f"{MARK}{event}\n")
    assert not list(tmp_path.rglob("outside"))


def test_lines_that_are_no_events_are_left_alone(tmp_path: Path) -> None:
    heard = Noted()
    Listener(heard).hear(f"{MARK}not json\n{MARK}{{}}\nplain\n")
    assert heard.heard == []


def test_the_bundle_is_the_app_of_the_checkout() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert table["components"] == COMPONENTS
    assert table["config"] == {**table["config"], **RUN_CONFIG}
    fab = bundle()
    assert fab == bundle()
    with zipfile.ZipFile(io.BytesIO(fab)) as files:
        names = set(files.namelist())
        assert tomllib.loads(files.read("pyproject.toml").decode())["project"]["name"] == "fedlora"
    for needed in (
        "simulations/server_app.py",
        "simulations/recipes/tiny.toml",
        "fedlora/tasks/tweets.jsonl",
        "clients/client_app.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    assert len(fab) < 10 * 10**6


def test_a_run_that_is_let_go_in_time_is_waited_for(tmp_path: Path) -> None:
    import threading

    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with alone(tmp_path):
            holding.set()
            release.wait()

    other = threading.Thread(target=hold)
    other.start()
    holding.wait()
    with pytest.raises(FedloraError, match="another process runs this run now"), alone(tmp_path):
        pass
    threading.Timer(0.3, release.set).start()
    with alone(tmp_path, patience=60.0):
        pass
    other.join()
