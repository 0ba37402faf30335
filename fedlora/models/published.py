"""Configurations of well-known models on the hub, to tell their shapes where they are not here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import LlamaConfig, PreTrainedConfig, RobertaConfig, ViTConfig

# Sizes as their own ``config.json`` files have them; the tests hold their numbers of parameters.
PUBLISHED: dict[str, Callable[..., PreTrainedConfig]] = {
    "FacebookAI/roberta-large": partial(
        RobertaConfig,
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    ),
    "google/vit-base-patch16-224-in21k": partial(
        ViTConfig,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        image_size=224,
        patch_size=16,
    ),
    "meta-llama/Llama-2-7b-hf": partial(
        LlamaConfig,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "meta-llama/Meta-Llama-3-8B": partial(
        LlamaConfig,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
