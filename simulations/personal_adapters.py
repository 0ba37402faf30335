"""The adapters of clients that keep a part of theirs, written beside the server's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Context
from safetensors.torch import load_file, save_file

from clients.personal import NAME
from fedlora.disk import whole_folder, writing
from fedlora.wire import tensors

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def save_personal(contexts: Mapping[int, Context], folder: Path) -> None:
    """Write ``personal/CLIENT`` for each client that keeps something; PEFT loads it.

    It is ``folder / "adapter"`` with the client's own tensors in it.

    Raises:
        FedloraError: they cannot be written.
    """
    shared = folder / "adapter"
    having = {client: found for client, found in contexts.items() if NAME in found.state}
    if not having:
        return
    with whole_folder(folder / "personal") as made, writing(folder / "personal"):
        for client, context in having.items():
            own = made / str(client)
            own.mkdir()
            shutil.copy(shared / SETTINGS, own)
            mine = tensors(cast(ArrayRecord, context.state[NAME]))
            save_file({**load_file(shared / WEIGHTS), **mine}, own / WEIGHTS, {"format": "pt"})
