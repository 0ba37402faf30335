"""The rows of the recipe ``tiny`` as files, one for each client, and the recipe that reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy

from fedlora.config import RunConfig
from fedlora.partition import deal
from fedlora.tasks.task import Examples, Task
from simulations.recipe import load

Row = Mapping[str, str]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def rows_of(task: Task, examples: Examples) -> list[Row]:
    return [
        {
            "label": task.label_names[label],
            "text": text,
            "kind": task.group_names[group],
            "row": natural,
        }
        for label, text, group, natural in zip(
            examples.labels, examples.texts, examples.groups, examples.natural, strict=True
        )
    ]


def tiny_as_files(folder: Path, kind: str = "csv", clients: int = 4) -> list[str]:
    """Each client's rows of ``tiny`` and its share of the test part, and what to override."""
    config = load("tiny").resolve(None, [f"clients.number={clients}"])
    task, parts = deal(config.task, config.clients, config.seed)
    for client, own in enumerate(parts):
        held_out = task.test.take(numpy.arange(client, len(task.test), clients))
        WRITERS[kind](folder / f"{client}.{kind}", rows_of(task, task.train.take(own)))
        WRITERS[kind](folder / f"{client}-test.{kind}", rows_of(task, held_out))
    return [
        f"clients.number={clients}",
        "clients.split=own",
        "task.name=local",
        f"task.options.path={folder}/{{client}}.{kind}",
        f"task.options.held_out={folder}/{{client}}-test.{kind}",
        f"task.options.labels={json.dumps(task.label_names)}",
        "task.options.group=kind",
        "task.options.validation=0",
    ]


def tiny_of_own(folder: Path, *overrides: str, kind: str = "csv") -> RunConfig:
    """The recipe ``tiny`` on these files."""
    return load("tiny").resolve(None, [*tiny_as_files(folder, kind), *overrides])
