"""Shapes of well-known models, pretrained models of images, and heads that do not train."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, ViTConfig, ViTForImageClassification

from fedlora.adapters import attach
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.errors import ConfigError
from fedlora.models import load_model, model_without_weights
from fedlora.models.base import BaseModel, ImageInputs
from fedlora.models.published import PUBLISHED
from fedlora.tasks.task import Examples, Objective

LABELS = {"FacebookAI/roberta-large": 2, "google/vit-base-patch16-224-in21k": 1000}
# as their authors' and transformers' documents count them, heads of so many labels included
PARAMETERS = {
    "FacebookAI/roberta-large": 355_361_794,
    "google/vit-base-patch16-224-in21k": 86_567_656,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
}
# of q and v at rank 8: layers * sum of r (d_in + d_out)
ADAPTERS = {
    "FacebookAI/roberta-large": 24 * 2 * 8 * (1024 + 1024),
    "google/vit-base-patch16-224-in21k": 12 * 2 * 8 * (768 + 768),
    "meta-llama/Llama-2-7b-hf": 32 * 2 * 8 * (4096 + 4096),
    "meta-llama/Meta-Llama-3-8B": 32 * 8 * ((4096 + 4096) + (4096 + 1024)),
}


def shapes(name: str, dtype: str = "float32") -> BaseModel:
    objective: Objective = "classify" if name in LABELS else "language"
    config = ModelConfig(name=name, dtype=dtype)
    base = model_without_weights(config, LABELS.get(name, 0), objective)
    assert base is not None
    return base


LARGE = "meta-llama/Meta-Llama-3-8B"
SHAPES = [pytest.param(n, marks=pytest.mark.slow) if n == LARGE else n for n in PUBLISHED]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones_and_pefts(name: str) -> None:
    base = shapes(name)
    assert sum(p.numel() for p in base.module.parameters()) == PARAMETERS[name]
    assert {p.device.type for p in base.module.parameters()} == {"meta"}
    targets = ["query", "value"] if "roberta" in name else ["q_proj", "v_proj"]
    config = AdapterConfig(rank=8, target_modules=tuple(targets), heads=False)
    ours = sum(p.numel() for p in attach(base, config, 0).trained.values())
    settings = LoraConfig(r=8, target_modules=targets)
    theirs, _ = get_peft_model(shapes(name).module, settings).get_nb_trainable_parameters()
    assert ours == theirs == ADAPTERS[name]


def test_shapes_have_the_recipes_type() -> None:
    module = shapes("google/vit-base-patch16-224-in21k", "bfloat16").module
    kinds = {name: p.dtype for name, p in module.named_parameters()}
    assert kinds.pop("classifier.weight") == kinds.pop("classifier.bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_a_configuration_that_is_here_goes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, num_labels, **more: small)
    base = shapes("google/vit-base-patch16-224-in21k")
    assert sum(p.numel() for p in base.module.parameters()) < 100_000


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A folder with a small ViT as the hub has them."""
    settings = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    ViTForImageClassification(settings).save_pretrained(str(folder))
    said = '{"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 2.0], "size": 8}'
    (folder / "preprocessor_config.json").write_text(said)
    return folder


def pictures(*shape: int) -> Examples:
    count = numpy.zeros(3, dtype=numpy.int64)
    images = numpy.random.default_rng(0).random((3, *shape), dtype=numpy.float32)
    return Examples(count, count, ("",) * 3, images=images)


def test_a_folder_with_a_model_of_images(vit: Path) -> None:
    base = load_model(ModelConfig(name=str(vit)), 5, "classify")
    assert base.heads == ("classifier",) and base.module.config.num_labels == 5
    examples = pictures(3, 8, 8)
    inputs = base.encode(examples)
    batch = inputs([2, 0])
    assert examples.images is not None
    raw = torch.from_numpy(examples.images)[[2, 0]]
    by_hand = [(raw[:, 0] - 0.5) / 0.5, (raw[:, 1] - 0.25) / 0.25, raw[:, 2] / 2]
    assert torch.equal(batch["pixel_values"], torch.stack(by_hand, dim=1))
    assert isinstance(inputs, ImageInputs)
    joined = ImageInputs.together([(inputs, [2]), (inputs, [0])])
    assert torch.equal(joined["pixel_values"], batch["pixel_values"])
    assert base.module(**batch).logits.shape == (2, 5)
    wrong = r"reads images of 3 x 8 x 8 \(channels, height, width\), and the task's are 1 x 9 x 9"
    with pytest.raises(ConfigError, match=wrong):
        base.encode(pictures(1, 9, 9))
    with pytest.raises(ConfigError, match=r"cannot load"):
        load_model(ModelConfig(name=str(vit)), 0, "language")


@pytest.mark.parametrize("adapter", ["lora", "lora_sb", "miss"])
def test_a_head_that_does_not_train_stays_and_does_not_travel(adapter: str, tmp_path: Path) -> None:
    base = load_model(ModelConfig(name="tiny_bert"), 3, "classify")
    before = base.module.classifier.weight.clone()
    model = attach(base, AdapterConfig(name=adapter, rank=4, heads=False), seed=7)
    assert not [key for key in model.trained if "classifier" in key]
    assert torch.equal(base.module.classifier.weight, before)
    again = load_model(ModelConfig(name="tiny_bert"), 3, "classify")
    assert torch.equal(again.module.classifier.weight, before)
    model.save(tmp_path)
    loaded = PeftModel.from_pretrained(again.module, str(tmp_path))
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(loaded(**ids).logits, model.module(**ids).logits)
    whole = attach(
        load_model(ModelConfig(name="tiny_bert"), 3, "classify"),
        AdapterConfig(name=adapter, rank=4),
        seed=7,
    )
    assert [key for key in whole.trained if "classifier" in key]
