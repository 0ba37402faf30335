"""Weights in llama.cpp's file format GGUF, made into a folder that transformers loads."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path

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
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its bar cannot be turned off
        warnings.simplefilter("ignore", FutureWarning)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        module = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # It refuses to save what is quantised, which this no longer is.
    vars(module)["hf_quantizer"] = None
    del module.config.quantization_config
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
