"""``fedlora list``: what there is of each kind, and how a recipe deals its data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, choose


def list_names(
    kind: str,
    partition: str | None,
    figure: Path | None,
    settings: Sequence[str],
    as_json: bool,
    table: bool = False,
) -> None:
    """The entries of one kind with the first line of each one's docstring.

    Of methods, ``table`` shows what each says of itself instead, as Markdown.
    """
    read = choose(KINDS, kind, "list")
    if table and kind != "methods":
        raise ConfigError(f"--table: found {kind!r}, allowed: with methods alone")
    if partition is not None and kind == "tasks":
        return show_partition(partition, settings, figure, as_json)
    if partition is not None or figure is not None or settings:
        raise ConfigError("list: --partition goes with tasks; --figure and --set go with it")
    if table:
        return show_rules(as_json)
    lines = read()
    if as_json:
        entries = [{"name": name, "what": what} for name, what in lines.items()]
        return click.echo(json.dumps(entries, indent=2))
    width = max(map(len, lines), default=0)
    for name, what in lines.items():
        click.echo(f"{name:<{width}}  {what}")


def show_rules(as_json: bool) -> None:
    """The table of rules."""
    from simulations import rules_table

    if as_json:
        return click.echo(json.dumps(rules_table.entries(), indent=2))
    click.echo(rules_table.markdown())


def show_partition(
    recipe: str, settings: Sequence[str], figure: Path | None, as_json: bool
) -> None:
    """How a recipe deals its training data to clients, as a table and a figure."""
    from fedlora.partition import deal, skew
    from simulations import figures
    from simulations.recipe import load

    config = load(recipe).resolve(None, settings)
    task, parts = deal(config.task, config.clients, config.seed)
    dealt = skew(task, parts)
    if figure is not None:
        try:
            figures.skew(dealt, figure, f"{task.name}, dealt by {config.clients.split}")
        except OSError as error:
            raise ConfigError(f"--figure: cannot write {figure} ({error.strerror})") from None
    if as_json:
        return click.echo(json.dumps([asdict(row) for row in dealt], indent=2))
    names = [f"label {name}" for name in task.label_names] + list(task.group_names)
    table = Table("client", "examples", *names)
    for row in dealt:
        labels = [row.labels.get(name, 0) for name in task.label_names]
        groups = [row.groups.get(name, 0) for name in task.group_names]
        table.add_row(*map(str, [row.client, row.examples, *labels, *groups]))
    Console().print(table)


def _methods() -> dict[str, str]:
    from strategies import METHODS

    return _described(METHODS)


def _tasks() -> dict[str, str]:
    from fedlora.tasks import TASKS

    return _described(TASKS)


def _models() -> dict[str, str]:
    from fedlora.models import MODELS

    return _described(MODELS)


def _adapters() -> dict[str, str]:
    from fedlora.adapters import ADAPTERS

    return _described(ADAPTERS)


def _recipes() -> dict[str, str]:
    from simulations.recipe import built_in

    return built_in()


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": _methods,
    "tasks": _tasks,
    "models": _models,
    "adapters": _adapters,
    "recipes": _recipes,
}


def _described(table: Mapping[str, object]) -> dict[str, str]:
    """Each entry's name and the first line of its docstring."""
    return {
        name: next(iter((inspect.getdoc(entry) or "").splitlines()), "")
        for name, entry in table.items()
    }
