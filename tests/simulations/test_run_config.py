"""A recipe's keys in Flower's run config, through Flower's own parser and its own messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args
from flwr.common.serde import user_config_from_proto, user_config_to_proto

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from simulations.recipe import load
from simulations.run_config import declared, from_run_config, keys, overrides

ROOT = Path(__file__).parent.parent.parent
TABLE = get_project_config(ROOT)["tool"]["flwr"]["app"]["config"]


def run(*arguments: str) -> RunConfig:
    """What the server app makes of ``flwr run . --run-config ARGUMENTS``."""
    given = user_config_from_proto(user_config_to_proto(parse_config_args(list(arguments))))
    return from_run_config(fuse_dicts(flatten_dict(TABLE), given, check_keys=True))


def flat(config: RunConfig) -> dict[str, Any]:
    """Every key of a whole configuration, as Flower can carry it."""

    def values(table: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            if isinstance(value, dict):
                found |= values(value, f"{where}{name}.")
            elif isinstance(value, list):
                found[where + name] = json.dumps(value)
            elif value is not None:
                found[where + name] = '""' if value == "" else value
        return found

    return values(config.model_dump(mode="json"), "")


def test_pyproject_declares_every_key_and_none_that_is_gone() -> None:
    """``python -m simulations.run_config`` prints what belongs between the marks."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    _, _, rest = text.partition("# begin of the recipe's keys")
    lines = rest.partition("# end of the recipe's keys")[0].splitlines(keepends=True)
    assert "".join(lines[1:]) == declared()
    assert set(keys()) < set(flatten_dict(TABLE))


def test_nothing_set_is_the_recipe_as_it_is() -> None:
    assert run() == load("tiny").resolve(None, [])
    assert run("recipe='digits'") == load("digits").resolve(None, [])
    assert overrides(flatten_dict(TABLE)) == []


RICH = {
    "private": ["privacy.unit=example", "privacy.epsilon=8.0", "privacy.ledger=/tmp/ledgers"],
    "clients": ["privacy.unit=client", "privacy.noise_multiplier=2.0", "privacy.delta=0.1"],
    "ranks": ["method=hetlora", "adapter.ranks=[2, 8]", "options.gamma=0.75"],
    "optimiser": ["options.server=adam", "options.server_tau=1e-4", "name=another.run"],
    "clock": ["clock.mode=fedbuff", "clock.buffer=2", "clock.speeds=lognormal"],
    "attack": ["method=krum", "clients.attackers=1", "clients.attack=label_flip"],
    "own": [
        "clients.split=own",
        "task.name=local",
        "task.options.path=/data/{client}.csv",
        'task.options.labels=["a b", "c\'d"]',
        'task.options.separator=" "',
        "task.options.grey=true",
    ],
    "core": ["method=fed_sb", "train.steps=0", "train.epochs=2", "launch.num_cpus=0.5"],
}


@pytest.mark.parametrize("name", RICH)
def test_a_whole_configuration_travels_key_by_key(name: str) -> None:
    config = load("tiny").resolve(None, RICH[name])
    given = flat(config)
    assert given.keys() <= set(keys())
    sent = user_config_from_proto(user_config_to_proto(given))
    fused = fuse_dicts(flatten_dict(TABLE), sent, check_keys=True)
    assert from_run_config(fused) == config
    assert from_run_config({**fused, "recipe": "quickstart"}) == config


def test_as_the_shell_gives_it() -> None:
    config = run("train.learning_rate=0.01 rounds=3", "adapter.target_modules='[\"query\"]'")
    words = ["train.learning_rate=0.01", "rounds=3", 'adapter.target_modules=["query"]']
    assert config == load("tiny").resolve(None, words)
    assert run("method='lora_fair' options.ridge=1 seed=0").options == {"ridge": 1}
    assert run("rounds=3 overrides='rounds=4 train.steps=2'").rounds == 4
    assert run("train.by_step=true").train.by_step is True


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.learning_rate=-1.0", r"train\.learning_rate: found -1\.0, allowed: greater than 0"),
        ("train.learning_rate='fast'", r"train\.learning_rate: found 'fast', allowed: a valid num"),
        ("rounds='3'", r"rounds: found '3', allowed: a valid integer"),
        ("method='fedavgg'", r"method: found 'fedavgg', .*did you mean 'fedavg'"),
        ("options.ridge=0.1", r"options of method 'fedavg': found 'ridge'"),
        ("adapter.ranks='2'", r"adapter\.ranks: found '2', allowed"),
        ("recipe='tinny'", r"recipe: found 'tinny', allowed: .*did you mean 'tiny'"),
    ],
)
def test_bad_values_are_one_line(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(argument)
    assert "\n" not in str(caught.value)


def test_flower_refuses_keys_that_are_not_declared() -> None:
    """Which is why each of ours is."""
    with pytest.raises(ValueError, match=r"train\.learning_rat"):
        run("train.learning_rat=0.01")
