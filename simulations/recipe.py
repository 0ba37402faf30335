"""Recipes: TOML files that say what to run, and how they become one ``RunConfig``."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from clients import attacks
from fedlora.config import PLACES, ModelConfig, RunConfig
from fedlora.errors import ConfigError, choose, unknown, wrong
from fedlora.fixed_point import FixedPoint
from fedlora.options import checked_options, read
from fedlora.ranks import ranks_of
from fedlora.rounds import FACTORS
from simulations.clock import check_clock
from strategies import METHODS, LoraStrategy
from strategies.adding import check_sums
from strategies.masked_round import check_masked
from strategies.server_optimizers import OPTIONS, ServerOptions, check_server

Table = dict[str, Any]  # Any: TOML values of several kinds


@dataclass(frozen=True)
class Recipe:
    """A recipe as written.

    Attributes:
        name: of the file, without its ending.
        question: its first comment line, what the run answers.
        table: its keys; ``compare`` and ``methods`` are read here, the rest is a ``RunConfig``.
    """

    name: str
    question: str
    table: Table

    @property
    def compare(self) -> tuple[str, ...]:
        """The methods that ``fedlora compare`` runs by default.

        Raises:
            ConfigError: ``compare`` is not a list of names.
        """
        names = self.table.get("compare", list(METHODS))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"compare: found {names!r}, allowed: a list of method names")
        return tuple(names)

    def resolve(self, method: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
        """The run for one method: the recipe, then ``[methods.NAME]``, then the overrides.

        Args:
            method: an entry of ``METHODS``; None takes the recipe's or the override's.
            overrides: ``KEY=VALUE`` with dotted keys and TOML values; bare words are strings.

        Raises:
            ConfigError: the first thing in it that is wrong.
        """
        table = copy.deepcopy(self.table)
        table.pop("compare", None)
        special = table.pop("methods", {})
        if not isinstance(special, dict):
            raise ConfigError(f"methods: found {special!r}, allowed: tables [methods.NAME]")
        for name in special:
            choose(METHODS, name, "methods")
        asked: Table = {"name": self.name}
        for override in overrides:
            _set(asked, override)
        if method is not None:
            asked["method"] = method
        if "ray" in table or "ray" in asked:
            allowed = f"its keys in [launch] ({', '.join(PLACES)})"
            raise ConfigError(f"unknown key in the recipe: found 'ray', allowed: {allowed}")
        chosen = asked.get("method", table.get("method", "fedavg"))
        _merge(table, {"method": chosen})
        if isinstance(chosen, str):
            _merge(table, special.get(chosen, {}))
        _merge(table, asked)
        config: RunConfig = read(RunConfig, table, "")
        _check_together(config)
        return config


def built_in() -> dict[str, str]:
    """Built-in recipes and the questions they answer; those of papers' settings come last."""
    return {name: load(name).question for name in _names()}


def _names() -> list[str]:
    """Of the built-in recipes, as one asks for them."""
    names = []
    for prefix in ("", "papers/"):
        files = resources.files("simulations").joinpath(f"recipes/{prefix}").iterdir()
        stems = [file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")]
        names += [prefix + stem for stem in sorted(stems)]
    return names


def _named(path: Path) -> str:
    """What runs of a recipe are called: as its file, or as the folder of a ``recipe.toml``."""
    folder = path.resolve().parent.name
    try:
        read(RunConfig, {"name": folder}, "")
    except ConfigError:  # not every folder's name may be a run's
        return path.stem
    return folder if path.stem == "recipe" else path.stem


def load(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or a TOML file by path.

    Raises:
        ConfigError: there is no such recipe, or it is not TOML (line and column given).
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"recipe: found no file {name_or_path!r}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {name_or_path}: cannot be read: {error}") from None
    else:
        names = _names()
        if name_or_path not in names:
            raise unknown("recipe", name_or_path, [*names, "a path to a .toml file"])
        file = resources.files("simulations").joinpath(f"recipes/{name_or_path}.toml")
        text = file.read_text(encoding="utf-8")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name_or_path}: not valid TOML: {error}") from None
    first = text.splitlines()[0] if text else ""
    return Recipe(_named(path), first.removeprefix("#").strip() if first[:1] == "#" else "", table)


def own_options(kind: type[LoraStrategy]) -> list[str]:
    """The names of a rule's options in a recipe."""
    shared = {field.name for field in fields(LoraStrategy)} - {*OPTIONS}
    return [field.name for field in fields(kind) if field.name not in shared]


def method_options(config: RunConfig) -> Table:
    """The options of the run's method, checked against its fields.

    Raises:
        ConfigError: an unknown method or option, or a value out of range or that does not fit.
    """
    kind = choose(METHODS, config.method, "method")
    own = own_options(kind)
    for name in config.options:
        if name not in own:
            raise unknown(f"unknown key in options of method {config.method!r}", name, own)
    options = checked_options(kind, config.options, "options")
    given = {name: value for name, value in options.items() if name in OPTIONS}
    check_server(kind.__name__, kind.averages, ServerOptions(**given))
    return options


def _check_together(config: RunConfig) -> None:
    """Refuse to ask for more clients than there are, and for what does not go together."""
    clients = config.clients
    attacks.options_of(clients)
    _check_own_rows(config)
    options = method_options(config)
    if config.adapter.ranks:
        _check_ranks(config)
    rule = METHODS[config.method](**options, ranks=ranks_of(config.adapter))
    private = config.privacy.unit == "client"
    if private and not rule.plan(1).send:
        allowed = f"'none' or 'example': {config.method} with these options shares nothing"
        raise wrong("privacy.unit", "client", allowed)
    if config.launch.sums == "workers":
        check_sums(config.method, rule.summed(), private, "launch.sums")
    if config.launch.sums == "masked":
        check_masked(config.method, rule.summed(), private, "launch.sums")
        secure, number = config.secure, clients.training
        FixedPoint(secure.clip, secure.bits, secure.examples, number)  # or it says why not
        spare = config.clock.over_select
        if config.clock.mode == "rounds" and spare * secure.threshold >= 1:
            allowed = f"below {1 / secure.threshold:g}, since more must last (secure.threshold)"
            raise wrong("clock.over_select", spare, allowed)
    check_clock(config, rule)
    if config.train.by_step:
        train = rule.plan(1).train
        if set(train) != set(FACTORS):
            allowed = f"false with {config.method}, which trains {train[0]} alone"
            raise wrong("train.by_step", True, allowed)
    if config.train.checkpointing and config.privacy.unit == "example":
        raise wrong("train.checkpointing", True, 'false with privacy.unit = "example"')
    if config.train.checkpointing and config.launch.pack > 1:
        raise wrong("launch.pack", config.launch.pack, "1 or 0 with train.checkpointing")
    if METHODS[config.method].changes_base:
        first = ModelConfig()
        for name in ("dtype", "quantise"):
            found, allowed = getattr(config.model, name), getattr(first, name)
            if found != allowed:
                why = f"{allowed!r} with {config.method}, which changes the base's weights"
                raise wrong(f"model.{name}", found, why)
    if clients.min_train_nodes > clients.training:
        less = " less clients.newcomers" if clients.newcomers else ""
        raise ConfigError(
            f"clients.min_train_nodes: found {clients.min_train_nodes}, allowed: at most "
            f"{clients.training}, the number of clients (clients.number{less})"
        )


def _check_ranks(config: RunConfig) -> None:
    """Refuse clients of several ranks where the adapter or the rule has none of them."""
    ranks, kind = list(config.adapter.ranks), METHODS[config.method]
    if config.adapter.name != "lora":
        raise wrong("adapter.ranks", ranks, f"none with adapter.name = {config.adapter.name!r}")
    kind.mixed_ranks.check(config.method, "adapter.ranks", ranks)


def _check_own_rows(config: RunConfig) -> None:
    """Refuse newcomers that nobody measures, and to measure what a private run may not tell."""
    clients, unit = config.clients, config.privacy.unit
    if clients.newcomers >= clients.number:
        allowed = f"at most {clients.number - 1}, so that one client trains (clients.number)"
        raise wrong("clients.newcomers", clients.newcomers, allowed)
    if clients.newcomers and not config.evaluate.personal:
        allowed = "0 without evaluate.personal = true, which measures them"
        raise wrong("clients.newcomers", clients.newcomers, allowed)
    if config.evaluate.rows == "own_groups" and clients.split == "own":
        allowed = "'share' with clients.split = 'own', where a client measures its own rows"
        raise wrong("evaluate.rows", "own_groups", allowed)
    if config.evaluate.personal and unit != "none":
        allowed = f'false with privacy.unit = "{unit}": it tells of private rows, without noise'
        raise wrong("evaluate.personal", True, allowed)


def _set(table: Table, override: str) -> None:
    """Put one ``KEY=VALUE`` into a table."""
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set: found {override!r}, allowed: KEY=VALUE, e.g. train.steps=5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for step in path[:-1]:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set: found {override!r}, and {step!r} is not a table")
    table[path[-1]] = parsed


def _merge(table: Table, over: Table, name: str = "") -> None:
    """Lay one table over another, table by table.

    Another choice (of ``method``, or of a table's ``name``) drops the options of the one before,
    and another ``privacy.unit`` the rest of ``[privacy]``; ``ranks`` drop the one ``rank``.
    """
    chooser = {"": "method", "privacy": "unit"}.get(name, "name")
    if chooser in table and over.get(chooser, table[chooser]) != table[chooser]:
        for key in list(table) if chooser == "unit" else ["options"]:
            table.pop(key, None)
    if over.get("ranks") and "rank" not in over:
        table.pop("rank", None)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value, key)
        else:
            table[key] = copy.deepcopy(value)
