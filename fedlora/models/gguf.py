"""Weights in llama.cpp's file format GGUF, made into a folder that transformers loads."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers

from fedlora.models.pretrained import quiet


def dequantise(weights: Path, folder: Path) -> None:
    """Save the causal model in a GGUF file, and its tokeniser, with weights in float32.

    It takes half a minute for 135 M parameters, and twice their memory.

    Raises:
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    quiet()
    place, name = str(weights.parent), weights.name
    kind: Any = transformers.AutoModelForCausalLM  # Any: what it makes has attributes of its own
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its bar cannot be turned off
        warnings.simplefilter("ignore", FutureWarning)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
        module = kind.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    module.hf_quantizer = None  # it refuses to save what is quantised, which this no longer is
    del module.config.quantization_config
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
