"""A recipe's keys in Flower's run config: flat, dotted, and each of them declared.

Flower lets ``--run-config`` set those keys alone that the app's own table declares, and knows no
lists. So ``pyproject.toml`` declares every key of a recipe with an empty text, which stands for
what the recipe says; ``python -m simulations.run_config`` prints them.
"""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping

import tomli_w

from clients.attacks import ATTACKS
from fedlora.adapters import ADAPTERS
from fedlora.config import RunConfig
from fedlora.models import MODELS
from fedlora.options import Part
from fedlora.tasks import TASKS
from simulations.recipe import load, own_options
from strategies import METHODS

UNSET = ""


def from_run_config(run_config: Mapping[str, object]) -> RunConfig:
    """The run that a Flower app's run config describes.

    ``config`` holds a whole ``RunConfig`` as JSON; otherwise ``recipe`` names a recipe, its own
    keys change it, and so does ``overrides`` after them: ``KEY=VALUE`` pairs separated by spaces,
    as on the command line.

    Raises:
        ConfigError: the first thing in it that is wrong.
    """
    if isinstance(text := run_config.get("config"), str) and text:
        return RunConfig.model_validate(json.loads(text))
    changes = [*overrides(run_config), *str(run_config.get("overrides", "")).split()]
    return load(str(run_config.get("recipe", "tiny"))).resolve(None, changes)


def overrides(run_config: Mapping[str, object]) -> list[str]:
    """What a run config sets of a recipe's keys, as ``KEY=VALUE`` with TOML values.

    A text that is a list or a quoted text in TOML stands for that; ``'""'`` is the empty text.
    """
    known = keys()
    asked = {key: run_config[key] for key in known if run_config.get(key, UNSET) != UNSET}
    return [f"{key}={_toml(value)}" for key, value in asked.items()]


def keys() -> list[str]:
    """Every key that some recipe can have, dotted, in the order of the configuration's types."""
    return list(_keys(RunConfig, ""))


def declared() -> str:
    """The keys as lines of the table ``[tool.flwr.app.config]``."""
    return "".join(f'{key} = "{UNSET}"\n' for key in keys())


def _keys(model: type[Part], where: str) -> Iterator[str]:
    """The keys of one table and of those in it."""
    for name, field in model.model_fields.items():
        key, kind = where + name, field.annotation
        if inspect.isclass(kind) and issubclass(kind, Part):
            yield from _keys(kind, f"{key}.")
        elif key in OPTIONS:
            yield from (f"{key}.{option}" for option in sorted(set(OPTIONS[key]())))
        else:
            yield key


def _of_functions(
    functions: Iterable[Callable[..., object]], leave_out: int
) -> Callable[[], list[str]]:
    """Their parameters but for so many leading ones, which are no options."""
    return lambda: [
        name for one in functions for name in list(inspect.signature(one).parameters)[leave_out:]
    ]


OPTIONS: dict[str, Callable[[], list[str]]] = {
    "options": lambda: [name for rule in METHODS.values() for name in own_options(rule)],
    "task.options": _of_functions(TASKS.values(), 0),
    "clients.attack_options": _of_functions(ATTACKS.values(), 1),
    "model.options": _of_functions(MODELS.values(), 3),
    "adapter.options": _of_functions([one.configure for one in ADAPTERS.values()], 2),
}


def _toml(value: object) -> str:
    """A value of Flower's as TOML."""
    if isinstance(value, str):
        try:
            meant = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            meant = None
        value = meant if isinstance(meant, list | str) else value
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


if __name__ == "__main__":
    print(declared(), end="")
