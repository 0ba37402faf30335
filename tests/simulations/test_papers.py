"""The papers' own settings: recipes that resolve, and dry runs without data or weights."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

from fedlora.config import ModelConfig
from fedlora.errors import MissingDataError, PrivacyError
from fedlora.models import load_model
from simulations.cli import main
from simulations.dry_run import DryRun, dry_run
from simulations.dry_run_table import table
from simulations.memory import Memory
from simulations.recipe import built_in, load
from simulations.statement import plan_run

ROOT = Path(__file__).parent.parent.parent
PAPERS = [name for name in built_in() if name.startswith("papers/")]
ROBERTA, VIT, LLAMA = 48 * 8 * 1024, 24 * 16 * 768, 64 * 8 * 4096  # of one factor, q and v
# method, numbers that a client trains, adapter and head, and how many clients
CASES = {
    "papers/ffa_lora_mnli": ("fedavg", 2 * ROBERTA, 3),
    "papers/ffa_lora_sst2": ("ffa_lora", ROBERTA, 3),
    "papers/lora_fair_domainnet": ("lora_fair", 2 * VIT + 769 * 100, 6),
    "papers/lora_fair_nico": ("ffa_lora", VIT + 769 * 60, 6),
    "papers/fedsa_lora_gsm8k": ("fedsa_lora", 2 * LLAMA, 3),
}


def told(name: str, method: str, *changes: str) -> DryRun:
    return dry_run(load(name).resolve(method, ["rounds=3", *changes]))


@pytest.mark.parametrize("name", PAPERS)
def test_every_method_of_every_paper_resolves(name: str) -> None:
    recipe = load(name)
    assert recipe.question.endswith(".") and "?" in recipe.question
    for method in recipe.compare:
        config = recipe.resolve(method)
        assert config.task.options["declared_rows"] and config.method == method
        assert config.name == name.removeprefix("papers/")


def test_they_are_listed_behind_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(names[: -len(PAPERS)]) + PAPERS and len(PAPERS) == 7
    assert main(["run", "papers/ffa_lora_mnlj", "--dry-run"]) == 2
    assert "did you mean 'papers/ffa_lora_mnli'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_needs_neither_data_nor_weights(name: str) -> None:
    method, trained, clients = CASES[name]
    found = told(name, method)
    assert found.trained_numbers == trained and found.clients == clients
    up = LLAMA if method == "fedsa_lora" else trained  # A alone travels
    assert found.traffic.up == 4 * clients * up and found.traffic.exact
    assert found.traffic.total_up == 3 * found.traffic.up
    assert found.missing and "cannot be loaded" in found.missing
    assert found.times is None and found.timing is None and not found.memory.measured
    assert (
        found.declared
        and found.declared.rows == load(name).table["task"]["options"]["declared_rows"]
    )
    assert "as the recipe declares, not read" in " ".join(table(found).columns[1].cells)


def test_rows_are_dealt_as_declared() -> None:
    found = told("papers/ffa_lora_mnli", "fedavg")
    assert found.declared and found.declared.kept == round(392702 * 7 / 8)
    assert found.examples.least == found.examples.greatest == pytest.approx(343614 / 3, rel=1e-4)
    private = ["privacy.unit=example", "privacy.epsilon=6.0"]  # and the reported delta of 1e-5
    with pytest.raises(PrivacyError, match="delta 1e-05 is not below 1/114536"):
        config = load("papers/ffa_lora_mnli").resolve("ffa_lora", private)
        plan_run(config, [int(found.examples.greatest)])
    uneven = told(
        "papers/ffa_lora_sst2", "ffa_lora", "clients.proportions=[[1.0,0.0],[0.5,0.5],[0.5,0.5]]"
    )
    assert uneven.examples.greatest == pytest.approx(58930 / 4, rel=1e-3)  # a label is used up
    nico = told("papers/lora_fair_nico", "fedavg", "train.steps=0", "train.epochs=1")
    assert nico.declared and nico.declared.kept == round(0.7 * 88866)
    assert nico.steps.greatest == -(-nico.examples.greatest // 128)


def test_memory_has_the_pictures_and_the_weights_type_in_it() -> None:
    small = "task.options.size=32"
    large, little = (
        told("papers/lora_fair_nico", "fedavg", *changes).memory for changes in ((), (small,))
    )
    assert large.worker - little.worker == round(0.7 * 88866) * 4 * 3 * (224**2 - 32**2)
    half = told("papers/fedsa_lora_gsm8k", "fedavg").memory
    adapter = 4 * 2 * LLAMA  # in float32, with gradients; SGD is counted with one more of them
    assert half == Memory(2 * 6_738_415_616 + 4 * adapter, 0, half.worker, 0, False)


def test_nothing_is_told_of_data_without_declared_sizes() -> None:
    for changes in (["task.options.declared_rows=0"], ["task.options.path=nobody/nothing"]):
        config = load("papers/ffa_lora_sst2").resolve("fedavg", ["rounds=1", *changes])
        if config.task.options["declared_rows"]:
            assert dry_run(config).declared
        else:
            with pytest.raises(MissingDataError, match="nyu-mll/glue"):
                dry_run(config)


def test_data_alone_may_be_missing(tmp_path: Path) -> None:
    settings = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ViTForImageClassification(settings).save_pretrained(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load_model(ModelConfig(name=str(tmp_path)), 60, "classify")
    changes = (f"model.name={tmp_path}", "adapter.rank=4")
    found = told("papers/lora_fair_nico", "fedavg", *changes)
    assert found.declared and found.times is None
    assert found.trained_numbers == 2 * 4 * (16 + 16) + 17 * 60


def test_a_dry_run_asks_no_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # read when its library is first imported
    assert main(["run", "papers/lora_fair_nico", "--dry-run"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "37,455 MB: as the recipe declares" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_in_the_recipe_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "clients.proportions=[[0.5,0.5]]": "clients.proportions",
        "adapter.rank=2000": "adapter.rank: found 2000, allowed: at most 1024",
        'adapter.target_modules=["q_proj"]': "matches no layer",
        "task.options.declared_rows=-1": "task.options.declared_rows: found -1",
        "task.options.path=tests": "task.options",
    }
    for change, expected in mistakes.items():
        assert main(["run", "papers/ffa_lora_sst2", "--dry-run", "--set", change]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert expected in printed.err


@pytest.mark.slow
def test_the_page_says_the_planned_noise() -> None:
    """Ten thousand private steps of MNLI, priced."""
    private = ("privacy.unit=example", "privacy.epsilon=6.0", "privacy.delta=1e-6")
    found = told("papers/ffa_lora_mnli", "ffa_lora", "rounds=1000", *private)
    assert found.privacy and found.privacy.epsilon < 6
    page = (ROOT / "results/papers/README.md").read_text(encoding="utf-8")
    assert f"is {found.privacy.noise_multiplier.greatest:.3f}, and" in page
    assert f"takes {found.memory.worker / 1e6:,.0f} MB by formula" in page


@pytest.mark.slow
def test_the_page_says_what_dry_runs_say() -> None:
    """The page's table, row by row; what all rounds send is a multiple, held elsewhere."""
    page = (ROOT / "results/papers/README.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `papers/")]
    seen = set()
    for line in lines:
        name, method, trained, up, down, memory = (cell.strip() for cell in line.split("|")[1:-1])
        recipe, _, change = name.strip("`").partition(" ")
        found = told(recipe, method, *filter(None, [change]))
        numbers = (found.trained_numbers, int(found.traffic.up), int(found.traffic.down))
        assert [int(cell.replace(",", "")) for cell in (trained, up, down)] == list(numbers), line
        assert memory == f"{found.memory.worker / 1e6:,.0f} MB", line
        seen.add(recipe)
    assert seen == set(PAPERS)


def test_the_page_gives_the_recipes_settings() -> None:
    """Rounds, steps, batch, rank and alpha of each setting, as the recipes have them."""
    page = (ROOT / "results/papers/README.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| setting `")]
    assert len(lines) == 3
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        prefix = cells[0].removeprefix("setting ").strip("`*")
        for name in (name for name in PAPERS if name.startswith(f"papers/{prefix}")):
            config = load(name).resolve(None)
            own = config.clients, config.rounds, config.train.steps, config.train.batch_size
            rank, alpha = config.adapter.rank, config.adapter.options["alpha"]
            assert cells[1:7] == [str(own[0].number), *map(str, own[1:]), str(rank), str(alpha)]


def test_recipes_are_valid_toml_with_their_source() -> None:
    for path in sorted((ROOT / "simulations/recipes/papers").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        assert "arXiv" in text and ("Reported" in text or "As in" in text or "reported" in text)
        assert json.dumps(tomllib.loads(text))
