"""Sweeps: TOML files that name a recipe and a grid of changes to it, and the cells they make.

::

    # Does label skew hurt LoRA-FAIR less than FedAvg?
    recipe = "digits"

    [set]                       # in every cell
    "train.steps" = 10

    [grid]
    method = ["fedavg", "lora_fair"]
    seed = [0, 1, 2]
    "clients.alpha" = [0.1, 0.5]

    [grid.skew]                 # an axis whose entries change several keys
    iid = { "clients.split" = "iid" }
    pathological = { "clients.split" = "pathological", "clients.classes" = 2 }
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, unknown, wrong
from simulations.recipe import Recipe, load

KEYS = ("recipe", "set", "grid")
Axis = Mapping[str, tuple[str, ...]]  # its entries by name, each with the changes that it makes


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder: its entries, and the beginning of its configuration's sha256.
        config: what it runs.
        refused: why it cannot run; empty if it can.
    """

    name: str
    config: RunConfig | None
    refused: str = ""

    @property
    def weight(self) -> int:
        """How long it takes beside other cells, roughly: client-rounds."""
        if self.config is None:
            return 0
        clients = self.config.clients
        drawn = max(clients.min_train_nodes, int(clients.training * clients.fraction_train))
        return self.config.rounds * drawn


@dataclass(frozen=True)
class Sweep:
    """A sweep as written.

    Attributes:
        name: of the file, without its ending.
        question: its first comment line.
        recipe: what its cells change.
        changes: in every cell, as ``KEY=VALUE``.
        axes: of the grid, by name.
    """

    name: str
    question: str
    recipe: Recipe
    changes: tuple[str, ...]
    axes: Mapping[str, Axis]

    def cells(self, more: Sequence[str] = ()) -> list[Cell]:
        """All cells, the last axis moving fastest; ``more`` changes come after all others.

        Raises:
            ConfigError: none can run (the first one's reason), or two are the same run.
        """
        found = [self._cell(entries, more) for entries in itertools.product(*self.axes.values())]
        if all(cell.refused for cell in found):
            raise ConfigError(found[0].refused)
        seen: dict[str, str] = {}
        for cell in found:
            if cell.config is None:
                continue
            same = seen.setdefault(_hash(cell.config), cell.name)
            if same != cell.name:
                raise ConfigError(
                    f"grid: {cell.name} is the same run as {same}, allowed: each run once"
                )
        return found

    def _cell(self, entries: tuple[str, ...], more: Sequence[str]) -> Cell:
        """The cell of one entry of each axis."""
        chosen = zip(self.axes.values(), entries, strict=True)
        changes = [change for axis, entry in chosen for change in axis[entry]]
        slug = "-".join(re.sub(r"[^A-Za-z0-9._+]+", "_", entry) for entry in entries)
        try:
            config = self.recipe.resolve(None, [*self.changes, *changes, *more])
        except ConfigError as error:
            return Cell(slug, None, str(error))
        return Cell(named(slug, config), config)


def named(slug: str, config: RunConfig) -> str:
    """The folder of a run: what it is called, and the beginning of what it is."""
    return f"{slug}-{_hash(config)[:8]}"


def read_sweep(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        ConfigError: there is no such file, it is not TOML, or something in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"sweep {path}: cannot be read: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"sweep {path}: not valid TOML: {error}") from None
    for key in table:
        if key not in KEYS:
            raise unknown(f"sweep {path}: unknown key", key, KEYS)
    recipe = table.get("recipe")
    if not isinstance(recipe, str):
        raise wrong(f"sweep {path}: recipe", recipe, "a recipe's name or file")
    beside = path.parent / recipe  # a file's name is meant from the sweep's folder
    grid = _table(table, "grid", path)
    if not grid:
        raise wrong(f"sweep {path}: grid", grid, "one axis or more")
    first = text.splitlines()[0]
    return Sweep(
        name=path.stem,
        question=first.removeprefix("#").strip() if first.startswith("#") else "",
        recipe=load(str(beside) if beside.is_file() else recipe),
        changes=tuple(_changes(_table(table, "set", path))),
        axes={name: _axis(name, entries, path) for name, entries in _flat(grid)},
    )


def _axis(name: str, entries: Any, path: Path) -> Axis:  # Any: TOML values
    """One axis from a list of values, or from a table of named changes."""
    if isinstance(entries, list) and entries and not any(isinstance(e, dict) for e in entries):
        last = "" if name == "method" else name.rpartition(".")[2]
        axis = {f"{last}{_word(entry)}": (_change(name, entry),) for entry in entries}
        if len(axis) == len(entries):
            return axis
    if isinstance(entries, dict) and entries and all(isinstance(e, dict) for e in entries.values()):
        return {entry: tuple(_changes(changes)) for entry, changes in entries.items()}
    allowed = "a list of values, each once, or tables of changes by name"
    raise wrong(f"sweep {path}: grid.{name}", entries, allowed)


def _flat(grid: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Axes by their dotted names; ``clients.alpha`` may be written without quotes."""
    for name, entries in grid.items():
        nested = isinstance(entries, dict) and (
            _is_table(name, entries)  # ``adapter.options.alpha``: no axis called adapter
            or not all(isinstance(entry, dict) for entry in entries.values())
        )
        if nested:
            yield from ((f"{name}.{inner}", found) for inner, found in _flat(entries))
        else:
            yield name, entries


def _is_table(name: str, entries: Mapping[str, Any]) -> bool:
    """Whether they are a recipe's table of that name and keys of it."""
    field = RunConfig.model_fields.get(name)
    keys = getattr(field.annotation, "model_fields", {}) if field else {}
    return set(entries) <= set(keys)


def _changes(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """A table of changes as ``KEY=VALUE`` with dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _changes(value, f"{above}{key}.")
        else:
            yield _change(f"{above}{key}", value)


def _change(key: str, value: Any) -> str:
    """One change; what JSON writes of strings, numbers and lists is TOML."""
    return f"{key}={json.dumps(value)}"


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    return value if isinstance(value, str) else json.dumps(value)


def _table(table: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """A table of the sweep's file, empty if it is not there."""
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise wrong(f"sweep {path}: {key}", found, f"a table [{key}]")
    return found


def _hash(config: RunConfig) -> str:
    """The sha256 of a configuration, whatever it is called and whoever is told of it."""
    told = config.model_dump(mode="json", exclude={"name": True, "launch": {"track"}})
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
