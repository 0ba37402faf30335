"""LoRA (Hu et al. 2022): ``W x + scale * B A x``, both factors trained."""

from __future__ import annotations

from typing import Annotated, Literal

from peft import LoraConfig, PeftConfig
from pydantic import Field, Strict

from fedlora.options import NonNegative, Positive

Layers = Annotated[tuple[int, ...], Strict(False)]


def lora(
    rank: int,
    target_modules: tuple[str, ...],
    alpha: Positive = 16.0,
    dropout: Annotated[NonNegative, Field(lt=1)] = 0.0,
    use_rslora: bool = False,
    layers: Layers = (),
    bias: Literal["none", "all", "lora_only"] = "none",
) -> PeftConfig:
    """LoRA: factors A [r, d_in] and B [d_out, r], scaled by alpha / r; product of two trained.

    ``layers`` adapts only the layers of these numbers; empty adapts all.
    """
    return LoraConfig(
        r=rank,
        target_modules=list(target_modules),
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=dropout,
        use_rslora=use_rslora,
        layers_to_transform=list(layers) or None,
        bias=bias,
    )
