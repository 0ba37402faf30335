"""A recipe, its methods' tables and overrides become one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config import PrivacyConfig
from fedlora.errors import ConfigError
from simulations.recipe import Recipe, load

PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip": 0.5}


def recipe(**table: object) -> Recipe:
    return Recipe("mine", "", {"task": {"name": "tweets"}, "privacy": PRIVATE, **table})


def test_another_unit_drops_the_rest_of_privacy() -> None:
    assert recipe().resolve(None, ["privacy.unit=none"]).privacy == PrivacyConfig()


def test_the_same_unit_keeps_it() -> None:
    found = recipe().resolve(None, ["privacy.unit=example", "privacy.epsilon=1.0"]).privacy
    assert (found.epsilon, found.delta, found.clip) == (1.0, 1e-3, 0.5)


def test_a_methods_own_unit_drops_it_for_that_method_alone() -> None:
    mixed = recipe(methods={"ffa_lora": {"privacy": {"unit": "none"}}})
    assert mixed.resolve("ffa_lora").privacy == PrivacyConfig()
    assert mixed.resolve("fedavg").privacy.epsilon == 8.0


def test_what_is_asked_beside_another_unit_is_not_dropped() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        recipe().resolve(None, ["privacy.unit=none", "privacy.epsilon=8.0"])


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_the_private_quickstart_runs_without_privacy(method: str) -> None:
    private = load("private-quickstart")
    assert private.resolve(method).privacy.epsilon == 8.0
    assert private.resolve(method, ["privacy.unit=none"]).privacy == PrivacyConfig()


def test_a_file_called_recipe_is_named_after_its_folder(tmp_path: Path) -> None:
    for file in ("recipe.toml", "other.toml"):
        (tmp_path / file).write_text('[task]\nname = "tweets"\n')
    assert load(str(tmp_path / "recipe.toml")).name == tmp_path.name
    assert load(str(tmp_path / "other.toml")).name == "other"
    odd = tmp_path / "my folder"
    odd.mkdir()
    (odd / "recipe.toml").write_text('[task]\nname = "tweets"\n')
    assert load(str(odd / "recipe.toml")).resolve(None).name == "recipe"
