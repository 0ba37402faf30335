"""MLflow: a run of its own for each of ours."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedlora.config import RunConfig
from fedlora.durable import write_whole
from simulations.resuming import flat

ALWAYS = "seconds/round"  # a number that every round has
PARAMETERS = 100  # of one request, at most
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowRun:
    """A run under MLflow's own settings (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ...).

    Its id is kept beside it. MLflow takes nothing back: of a round that is done again it keeps what
    it was told first. Unless the environment says more, a server that does not answer is given up
    within a minute.
    """

    def __init__(self, place: Path, config: RunConfig, following: int) -> None:
        """``following``: the next round."""
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        self._client, known = MlflowClient(), place / "mlflow-run"
        if known.is_file():
            self._id = known.read_text()
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._begun(config, place.parent.name)
            write_whole(known, self._id.encode())
        steps = [metric.step for metric in self._client.get_metric_history(self._id, ALWAYS)]
        self.told = max(steps, default=-1)

    def _begun(self, config: RunConfig, name: str) -> str:
        """The id of a new run that knows its recipe."""
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedlora")
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run: str = self._client.create_run(place, run_name=name).info.run_id
        recipe = flat(config.model_dump(mode="json"))
        told = [Param(key, str(value)) for key, value in recipe.items()]
        for start in range(0, len(told), PARAMETERS):
            self._client.log_batch(run, params=told[start : start + PARAMETERS])
        return run

    def add(self, round: int, values: Mapping[str, float]) -> None:
        """Log one round as a step, under names without characters that MLflow refuses."""
        if round <= self.told:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {re.sub(r"[^\w.\-/ ]", "_", name): value for name, value in values.items()}
        metrics = [Metric(name, value, now, round) for name, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: Literal["finished", "failed"]) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FINISHED" if status == "finished" else "FAILED")
