"""Frozen base models: the door to transformers.

``MODELS`` maps a name to a function; any other name is a folder, a package or a hub name. A base
model is built the same way in every process: same weights, same head, same fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fedlora.config import ModelConfig
from fedlora.errors import unknown
from fedlora.models.base import BaseModel, Inputs
from fedlora.models.precision import (
    check_quantisable,
    keep_in,
    move,
    quantisation,
    quantised,
)
from fedlora.models.pretrained import (
    from_folder,
    minilm,
    mixer,
    packaged,
    shapes_of,
    smollm2,
)
from fedlora.models.tiny import tiny_bert, tiny_llama, tiny_vit
from fedlora.options import checked_options
from fedlora.tasks.task import Objective

__all__ = [
    "MODELS",
    "BaseModel",
    "Inputs",
    "fingerprint",
    "load_model",
    "model_without_weights",
    "move",
]

MODELS: dict[str, Callable[..., BaseModel]] = {
    "minilm": minilm,
    "mixer": mixer,
    "smollm2": smollm2,
    "tiny_bert": tiny_bert,
    "tiny_llama": tiny_llama,
    "tiny_vit": tiny_vit,
}


def load_model(config: ModelConfig, label_count: int, objective: Objective) -> BaseModel:
    """The base model of a recipe, frozen and in evaluation mode, on the CPU.

    Raises:
        ConfigError: unknown name or option, weights not there, or a folder that is no model.
    """
    if config.name in MODELS:
        build = MODELS[config.name]
        options = checked_options(build, config.options, "model.options", leave_out=3)
        check_quantisable(config)
        base = build(label_count, objective, config.max_length, **options)
    else:
        known = "/" in config.name or Path(config.name).exists()
        path = config.name if known else packaged(config.name)
        if path is None:
            others = ("a folder", "a package that carries a model", "a hub name owner/model")
            raise unknown("model.name", config.name, [*MODELS, *others])
        if config.options:
            raise unknown("unknown key in model.options", next(iter(config.options)), ())
        changes = {"dtype": getattr(torch, config.dtype), **quantisation(config)}
        base = from_folder(path, label_count, objective, config.max_length, **changes)
    keep_in(base.module, config.dtype, base.heads)
    base.module.requires_grad_(False).eval()
    return base


def model_without_weights(
    config: ModelConfig, label_count: int, objective: Objective
) -> BaseModel | None:
    """The shapes of a model whose configuration is here or known, on torch's ``meta`` device.

    None for built-in models, and where there is no configuration; it cannot encode examples.
    """
    if config.name in MODELS:
        return None
    base = shapes_of(config.name, label_count, objective)
    if base is not None:
        keep_in(base.module, config.dtype, base.heads)
        base.module.requires_grad_(False)
    return base


def fingerprint(module: nn.Module) -> str:
    """A short hash of a base model: names, types, shapes and 64 spread values of each tensor.

    Of a quantised layer, its type and size alone: devices may round its weights otherwise.
    """
    digest = hashlib.sha256()
    packed = {path: layer for path, layer in module.named_modules() if quantised(layer)}
    for path, layer in packed.items():
        digest.update(f"{path}{type(layer).__name__}{layer.extra_repr()}".encode())
    for name, tensor in module.state_dict().items():
        if any(name.startswith(f"{path}.") for path in packed):
            continue
        flat = tensor.detach().reshape(-1)
        last = max(flat.numel() - 1, 0)  # which linspace rounds up where float32 cannot hold it
        spread = torch.linspace(0, last, min(64, flat.numel())).long().clamp(max=last)
        kind = "" if tensor.dtype == torch.float32 else str(tensor.dtype)
        digest.update(f"{name}{kind}{list(tensor.shape)}".encode())
        digest.update(flat[spread].cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
