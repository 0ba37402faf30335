"""How the runs' data was dealt to clients, dealt again from their configurations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedlora.config import ClientsConfig, TaskConfig
from fedlora.errors import ConfigError, FedloraError
from simulations.run_folders import Run

# A page of somebody else's runs must not make us read a folder or a hub that they name.
TASKS = ("tweets", "tweets_lm", "vader", "digits", "emoji", "fashion", "shakespeare")
DEALING = ("number", "split", "alpha", "classes", "proportions", "min_examples")
MOST = 4  # dealings that are shown
Chart = dict[str, Any]  # Any: JSON values of several kinds


def dealings(runs: Sequence[Run]) -> tuple[list[Chart], list[str]]:
    """Charts of who holds what, one or two for each way of dealing; and what is not shown, why."""
    first: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        clients = run.config.get("clients", {})
        task = run.config.get("task", {})
        dealing = {key: clients[key] for key in DEALING if key in clients}
        first.setdefault(json.dumps([task.get("name"), task.get("options"), dealing]), run)
    found, missing = list[Chart](), list[str]()
    for run in list(first.values())[:MOST]:
        try:
            found += _dealt(run, len(found))
        except FedloraError as error:
            missing.append(f"{_words(run)}: {' '.join(str(error).split())}")
        except ValueError:
            missing.append(f"{_words(run)}: its configuration is none of this version")
    if len(first) > MOST:
        missing.append(f"{len(first) - MOST} more ways of dealing are not shown")
    return found, missing


def _dealt(run: Run, number: int) -> list[Chart]:
    """The charts of one dealing.

    Raises:
        FedloraError: the data is not here, or cannot be dealt so.
        ValueError: the configuration cannot be read.
    """
    task_config = TaskConfig.model_validate(run.config.get("task", {}))
    if task_config.name not in TASKS:
        raise ConfigError(f"task {task_config.name!r} brings no data of its own to deal again")
    from fedlora.partition import partition, skew
    from fedlora.tasks import load_task

    task = load_task(task_config)
    clients = ClientsConfig.model_validate(run.config.get("clients", {}))
    rows = skew(task, partition(task, clients, run.seed))
    kinds = [("labels", [row.labels for row in rows]), ("groups", [row.groups for row in rows])]
    charts = []
    for kind, counts in kinds:
        names = list(dict.fromkeys(name for count in counts for name in count))
        if len(names) > 1:
            charts.append(
                {
                    "id": f"dealt-{number}-{kind}",
                    "kind": "bars",
                    "title": f"{kind.capitalize()} by client",
                    "note": _words(run),
                    "x": {"label": "client"},
                    "y": {"label": "training examples"},
                    "parts": names,
                    "bars": [[count.get(name, 0) for name in names] for count in counts],
                }
            )
    return charts


def _words(run: Run) -> str:
    """A dealing in words."""
    clients = run.config.get("clients", {})
    split = clients.get("split", "group")
    more = {"dirichlet": "alpha", "group_dirichlet": "alpha", "pathological": "classes"}.get(split)
    details = f" ({more} {clients[more]:g})" if more in clients else ""
    task = run.config.get("task", {}).get("name", "?")
    return f"{task}, {clients.get('number', '?')} clients, {split}{details}, seed {run.seed}"
