"""What a node lacks is written once, whole, where the node itself would look for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedlora import fetch, smollm2_weights
from fedlora.config import ClientConfig, ModelConfig, TaskConfig
from fedlora.errors import ConfigError, FedloraError
from simulations.shipping import cargo, unload


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of this machine, and soon of the node."""
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def config(task: str = "tweets", model: str = "tiny_bert") -> ClientConfig:
    return ClientConfig(task=TaskConfig(name=task), model=ModelConfig(name=model))


def sent(config: ClientConfig) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in cargo(config).items()}


def test_data_and_a_package_arrive_where_they_are_looked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / fetch.VADER_FILE).write_bytes(b"sentences")
    package = tmp_path / "site" / "carries_a_model"
    for name in ("__init__.py", "model/config.json", "__pycache__/x.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    with monkeypatch.context() as here:
        here.syspath_prepend(package.parent)
        files = sent(config("vader", "carries_a_model"))
    inside = "packages/carries_a_model"
    assert list(files) == [fetch.VADER_FILE, f"{inside}/__init__.py", f"{inside}/model/config.json"]

    node = tmp_path / "node"
    monkeypatch.setenv("FEDLORA_DATA", str(node))
    with pytest.raises(ConfigError, match="not found"):
        fetch.find("vader")
    asked = []

    def bring() -> dict[str, bytes]:
        asked.append(1)
        return files

    assert len(unload(list(files), bring)) == 3 and len(asked) == 1
    assert fetch.find("vader").read_bytes() == b"sentences"
    from simulations.shipping import _roots

    assert _roots("carries_a_model") == [node / inside]
    assert not unload(list(files), bring) and len(asked) == 1  # all there
    (node / fetch.VADER_FILE).unlink()
    assert unload(list(files), bring) == [node / fetch.VADER_FILE]
    assert not list(node.rglob("*.part"))


def test_a_folder_goes_to_the_same_place(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = sent(config(model=str(model)))
    assert files == {str(model / "config.json"): b"{}"}
    (model / "config.json").unlink()
    assert unload(list(files), lambda: files) == [model / "config.json"]
    assert (model / "config.json").read_text() == "{}"


def test_what_was_fetched_arrives_as_it_lies_in_the_data_folder(folder: Path) -> None:
    (folder / fetch.SHAKESPEARE_FILE).write_bytes(b"plays")
    model = folder / smollm2_weights.FOLDER
    model.mkdir()
    for name in ("model.safetensors", "config.json"):
        (model / name).write_text(name)
    assert sent(config("shakespeare", "smollm2")) == {
        fetch.SHAKESPEARE_FILE: b"plays",
        f"{model.name}/config.json": b"config.json",
        f"{model.name}/model.safetensors": b"model.safetensors",
    }


def test_what_is_built_in_is_not_shipped_and_what_is_not_here_is_named() -> None:
    assert cargo(config()) == {}
    with pytest.raises(ConfigError, match="vader: not found at"):
        cargo(config("vader"))


def test_a_node_that_cannot_write_says_so(folder: Path) -> None:
    (folder / "packages").write_text("in the way")
    with pytest.raises(FedloraError, match="cannot be written"):
        unload(["packages/no_such/x"], lambda: {"packages/no_such/x": b""})
