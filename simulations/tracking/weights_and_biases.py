"""Weights & Biases: a run of its own for each of ours."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedlora.config import RunConfig
from fedlora.durable import write_whole

SECONDS = 20.0  # for the service to answer, and for the last numbers to be sent


class WandbRun:
    """A run under W&B's own settings (``WANDB_PROJECT``, ``WANDB_MODE``, ...).

    Its id is kept beside it. W&B takes a step once: of a round that is done again it keeps what it
    was told first. Offline it knows no earlier part, so each part's folder holds all rounds.
    """

    def __init__(self, place: Path, config: RunConfig, following: int) -> None:
        """``following``: the next round."""
        import wandb

        known = place / "wandb-id"
        if not known.is_file():
            write_whole(known, secrets.token_hex(8).encode())
        self._run = wandb.init(
            id=known.read_text(),
            name=place.parent.name,
            project=os.environ.get("WANDB_PROJECT", "fedlora"),
            config=config.model_dump(mode="json"),
            dir=place,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=SECONDS,
                login_timeout=SECONDS,
                finish_timeout=SECONDS,
            ),
        )
        self.told = self._run.step - 1

    def add(self, round: int, values: Mapping[str, float]) -> None:
        """Log one round as a step."""
        self._run.log(dict(values), step=round)

    def close(self, status: Literal["finished", "failed"]) -> None:
        """Send the rest, for ``SECONDS`` at most; what is left lies in the folder."""
        self._run.finish(exit_code=int(status == "failed"))
