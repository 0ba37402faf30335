"""Adapter types on a frozen base: the door to PEFT.

An adapter type is one function that returns a PEFT configuration, and one line in
``ADAPTERS``. Its first docstring line is what ``fedlora list adapters`` shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fedlora.adapters.lora import lora
from fedlora.adapters.lora_sb import as_lora, fixed_of, lora_sb
from fedlora.adapters.miss import miss
from fedlora.adapters.wider import put_pairs
from fedlora.config import AdapterConfig
from fedlora.disk import writing
from fedlora.errors import ConfigError, choose
from fedlora.lowrank import LoraPair
from fedlora.models.base import BaseModel
from fedlora.options import checked_options
from fedlora.seeds import ambient


@dataclass(frozen=True)
class AdapterType:
    """One kind of adapter.

    Attributes:
        configure: ``(rank, target_modules, **options) -> PeftConfig``.
        affine: whether the weight change is affine in what trains, so that averaging what
            trains averages the weight changes exactly.
    """

    configure: Callable[..., PeftConfig]
    affine: bool

    @property
    def __doc__(self) -> str:  # type: ignore[override]  # the table shows the function's line
        """The configuring function's docstring."""
        return self.configure.__doc__ or ""


ADAPTERS: dict[str, AdapterType] = {
    "lora": AdapterType(lora, affine=False),
    "lora_sb": AdapterType(lora_sb, affine=True),
    "miss": AdapterType(miss, affine=True),
}


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with an adapter in it.

    Attributes:
        base: what it was built from; its module now holds the adapter's layers.
        module: the PEFT model; call it as the base is called.
        trained: wire key (PEFT's state-dict key) to the live parameter, all that trains.
    """

    base: BaseModel
    module: PeftModel
    trained: Mapping[str, nn.Parameter]

    def deltas(self) -> dict[str, Tensor]:
        """The weight change of each adapted layer as a dense matrix (for small models)."""
        changes = {}
        for name, layer in self.module.named_modules():
            if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "scaling", ()):
                changes[name] = layer.get_delta_weight("default").detach()
            elif hasattr(layer, "miss_block") and "default" in layer.miss_block:
                weight = layer.get_base_layer().weight.detach()
                changed = layer.get_delta_weight_miss("default", weight)
                changes[name] = changed.detach() - weight
        return changes

    def scales(self) -> dict[str, float]:
        """``alpha / r`` of each factor pair, by its key with ``{}`` for the factor's letter."""
        return {pair: float(layer.scaling["default"]) for pair, layer in self.pair_layers().items()}

    def pair_layers(self) -> dict[str, Any]:  # Any: PEFT's layers of several kinds
        """PEFT's layer of each factor pair, by the pair's key."""
        return {
            f"{name}.lora_{{}}.weight": layer
            for name, layer in self.module.named_modules()
            if f"{name}.lora_A.weight" in self.trained
        }

    def fixed(self) -> dict[str, Tensor]:
        """Factors that never train and do not travel, by key; every process finds the same."""
        return fixed_of(dict(self.module.named_modules()))

    def layers(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Each layer that the adapter put in, with the frozen layer inside it; heads have none."""
        found: list[tuple[nn.Module, nn.Module | None]] = []
        for layer in self.module.modules():
            if isinstance(layer, AuxiliaryTrainingWrapper):
                found.append((layer, None))
            elif isinstance(layer, nn.Module) and isinstance(layer, BaseTunerLayer):
                found.append((layer, layer.get_base_layer()))
        return found

    def save(self, folder: Path, pairs: Mapping[str, LoraPair] = MappingProxyType({})) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for PEFT to load.

        What PEFT does not know is written as the LoRA of rank r that it is equal to. ``pairs`` by
        their keys are written in the place of the model's; they may have other ranks.

        Raises:
            FedloraError: they cannot be written.
        """
        state = as_lora(self.module.state_dict(), dict(self.module.named_modules()))
        with writing(folder):
            self.module.save_pretrained(str(folder), state_dict=state)
            if pairs:
                put_pairs(folder, pairs)


def attach(base: BaseModel, config: AdapterConfig, seed: int) -> AdaptedModel:
    """Put a fresh adapter into ``base``, drawn from ``seed``: the same draw in every process.

    Raises:
        ConfigError: unknown adapter or option, target modules that match nothing, or a rank
            above a layer's size.
    """
    kind = choose(ADAPTERS, config.name, "adapter.name")
    _check_targets(base.module, config)
    options = checked_options(kind.configure, config.options, "adapter.options", leave_out=2)
    settings = kind.configure(config.rank, config.target_modules, **options)
    heads = base.heads if config.heads else ()
    # PEFT trains the head of whatever it takes for a classifier.
    settings.task_type = base.task_type if heads or base.objective == "language" else None
    settings.modules_to_save = list(heads)  # type: ignore[attr-defined]  # on subclasses
    with warnings.catch_warnings(), ambient(seed, "adapter", config.name):
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base.module, settings)
        _draw_heads(model, heads)
    return AdaptedModel(base, model, _trained(model))


def _draw_heads(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Draw the heads anew from the ambient stream, so that they depend on the seed alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(
            f".{head}.modules_to_save." in f".{name}." for head in heads
        ):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _trained(model: PeftModel) -> dict[str, nn.Parameter]:
    """Wire keys of the live parameters, as PEFT's state dict names them."""
    live = {id(p): p for p in model.parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Tensor] = get_peft_model_state_dict(
            model, state_dict=model.state_dict(keep_vars=True)
        )
    found = {key: live[id(value)] for key, value in state.items() if id(value) in live}
    if len(found) != len(live):
        raise ConfigError(
            f"adapter.name: {len(live)} tensors train but PEFT saves {len(found)} of them; "
            "every trained tensor must have a key of its own"
        )
    return found


def _check_targets(module: nn.Module, config: AdapterConfig) -> None:
    """Refuse targets that match nothing and ranks that no layer can hold."""
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    for target in config.target_modules:
        matched = {
            name: layer
            for name, layer in linear.items()
            if name == target or name.endswith(f".{target}")
        }
        if not matched:
            names = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"adapter.target_modules: found {target!r}, which matches no layer of this "
                f"model, allowed: {', '.join(names)}"
            )
        for name, layer in matched.items():
            limit = min(layer.in_features, layer.out_features)
            if config.rank > limit:
                raise ConfigError(
                    f"adapter.rank: found {config.rank}, allowed: at most {limit}, the size of "
                    f"layer {name!r} ({layer.in_features} to {layer.out_features})"
                )
    if not config.target_modules:
        raise ConfigError("adapter.target_modules: found none, allowed: at least one layer name")


def load_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into live parameters, in one fused call; keys must be known."""
    if not values:
        return
    with torch.no_grad():
        torch._foreach_copy_(
            [parameters[key].data for key in values],
            [value.to(parameters[key].device) for key, value in values.items()],
        )
