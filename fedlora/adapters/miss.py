"""MiSS (Kang and Yin, arXiv 2409.15371): one matrix added to every shard of a layer's input."""

from __future__ import annotations

from typing import Annotated

from peft import MissConfig, PeftConfig
from pydantic import Field

from fedlora.options import NonNegative


def miss(
    rank: int,
    target_modules: tuple[str, ...],
    dropout: Annotated[NonNegative, Field(lt=1)] = 0.0,
) -> PeftConfig:
    """MiSS: one matrix D [r, d_out] per layer, so the mean of clients is exact."""
    return MissConfig(r=rank, target_modules=list(target_modules), miss_dropout=dropout)
