"""What a user can get wrong: exit code 2, one line that helps, no traceback, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.cli import main

ATTACKED = ["--set", "clients.attackers=1"]
PRIVATE = ["--set", "privacy.unit=example"]
TARGET = [*PRIVATE, "--set", "privacy.epsilon=8.0"]

# arguments after `run tiny`, then what the one line must contain
CASES = {
    "unknown rule": (["--method", "fedavgg"], ["method", "'fedavgg'", "did you mean 'fedavg'"]),
    "unknown task": (["--set", "task.name=tweats"], ["task.name", "did you mean 'tweets'"]),
    "unknown model": (["--set", "model.name=minilmm"], ["model.name", "did you mean 'minilm'"]),
    "unknown adapter": (["--set", "adapter.name=lore"], ["adapter.name", "did you mean 'lora'"]),
    "unknown key": (["--set", "train.stesp=3"], ["train", "'stesp'", "did you mean 'steps'"]),
    "unknown table": (["--set", "trian.steps=3"], ["'trian'", "did you mean 'train'"]),
    "unknown method option": (
        ["--method", "lora_fair", "--set", "options.rigde=1"],
        ["lora_fair", "'rigde'", "did you mean 'ridge'"],
    ),
    "unknown task option": (["--set", "task.options.label=x"], ["task.options", "'labels'"]),
    "unknown adapter option": (["--set", "adapter.options.alfa=1"], ["did you mean 'alpha'"]),
    "layers that MiniLM lacks": (
        ["--set", "model.name=minilm", "--set", "model.options.layers=7"],
        ["model.options.layers", "found 7", "at most 6"],
    ),
    "clients' privacy where nothing is shared": (
        [
            "--method",
            "fedsa_lora",
            "--set",
            "options.share=none",
            "--set",
            "privacy.unit=client",
            "--set",
            "privacy.epsilon=8.0",
            "--set",
            "privacy.delta=1e-3",
            "--set",
            "privacy.clip=1.0",
        ],
        ["privacy.unit", "found 'client'", "shares nothing"],
    ),
    "a table that is in another": (
        ["--set", "ray.num_gpus=1"],
        ["unknown key in the recipe", "found 'ray'", "[launch]", "num_gpus", "placement"],
    ),
    "a core and a half": (["--set", "launch.num_cpus=1.5"], ["launch.num_cpus", "whole number"]),
    "cores as a custom resource": (
        ["--set", "launch.resources.CPU=1"],
        ["launch.resources", "num_cpus"],
    ),
    "an address of no backend": (
        ["--address", "127.0.0.1:1", "--backend", "inprocess"],
        ["--address", "found '127.0.0.1:1'", "--backend ray"],
    ),
    "an address of nobody": (
        ["--address", "127.0.0.1:1"],
        ["launch.address", "cannot join '127.0.0.1:1'", "refused"],
    ),
    "no rounds": (["--rounds", "0"], ["rounds", "found 0", "greater than or equal to 1"]),
    "fewer rounds": (["--rounds", "-1"], ["rounds", "found -1"]),
    "rounds in words": (["--set", "rounds=ten"], ["rounds", "found 'ten'", "integer"]),
    "rounds as text": (["--set", 'rounds="3"'], ["rounds", "found '3'", "integer"]),
    "fraction above 1": (
        ["--set", "clients.fraction_train=1.5"],
        ["clients.fraction_train", "found 1.5", "less than or equal to 1"],
    ),
    "rank 0": (["--set", "adapter.rank=0"], ["adapter.rank", "found 0"]),
    "ranks that are no list": (["--set", "adapter.ranks=4"], ["adapter.ranks", "found 4"]),
    "a rank of 0 among others": (["--set", "adapter.ranks=[4, 0]"], ["adapter.ranks.1", "found 0"]),
    "ranks in words": (["--set", 'adapter.ranks=["4"]'], ["adapter.ranks.0", "found '4'"]),
    "ranks beside another rank": (
        ["--set", "adapter.ranks=[2, 4]", "--set", "adapter.rank=8"],
        ["adapter.ranks", "found [2, 4]", "adapter.rank, 8"],
    ),
    "ranks above a layer": (
        ["--set", "adapter.ranks=[2, 33]"],
        ["adapter.rank", "found 33", "at most 32", "query"],
    ),
    "ranks of another adapter": (
        ["--set", "adapter.name=miss", "--set", "adapter.ranks=[2, 4]"],
        ["adapter.ranks", "found [2, 4]", "'miss'"],
    ),
    "ranks with a rule that takes one": (
        ["--method", "median", "--set", "adapter.ranks=[2, 4]"],
        ["adapter.ranks", "found [2, 4]", "one rank with median", "vote"],
    ),
    "rank above a layer": (
        ["--set", "adapter.rank=33"],
        ["adapter.rank", "found 33", "at most 32", "query"],
    ),
    "targets that match nothing": (
        ["--set", 'adapter.target_modules=["q_proj"]'],
        ["adapter.target_modules", "'q_proj'", "query", "value"],
    ),
    "no targets": (["--set", "adapter.target_modules=[]"], ["adapter.target_modules"]),
    "alpha 0": (["--set", "adapter.options.alpha=0"], ["adapter.options.alpha", "found 0"]),
    "NaN learning rate": (
        ["--set", "train.learning_rate=nan"],
        ["train.learning_rate", "found nan", "finite"],
    ),
    "negative learning rate": (["--set", "train.learning_rate=-1.0"], ["found -1.0"]),
    "batch of none": (["--set", "train.batch_size=0"], ["train.batch_size", "found 0"]),
    "steps and epochs": (["--set", "train.epochs=1"], ["train", "exactly one of steps and epochs"]),
    "a client without examples": (
        [
            *["--set", 'clients.split="dirichlet"', "--set", "clients.alpha=0.01"],
            *["--set", "clients.number=60"],
        ],
        ["client", "clients.min_examples"],
    ),
    "more clients than groups": (
        ["--set", 'clients.split="group"', "--set", "clients.number=9"],
        ["clients.number", "found 9", "allowed: 2", "short, long"],
    ),
    "more clients wanted than exist": (
        ["--set", "clients.min_train_nodes=9"],
        ["clients.min_train_nodes", "found 9", "at most 4"],
    ),
    "no clients": (["--set", "clients.number=0"], ["clients.number", "found 0", "equal to 1"]),
    "true clients": (["--set", "clients.number=true"], ["clients.number", "found True"]),
    "more clients than examples": (
        ["--set", "clients.number=100000"],
        ["clients.number", "found 100000", "allowed: at most 221", "tweets"],
    ),
    "no time": (["--set", "clients.timeout=0.0"], ["clients.timeout", "found 0.0"]),
    "NaN alpha": (
        ["--set", "adapter.options.alpha=nan"],
        ["adapter.options.alpha", "found nan", "finite"],
    ),
    "infinite attack": (
        [*ATTACKED, "--set", "clients.attack_options.factor=inf"],
        ["clients.attack_options.factor", "found inf", "finite"],
    ),
    "unknown attack": (
        [*ATTACKED, "--set", "clients.attack=sign_flap"],
        ["clients.attack", "'sign_flap'", "did you mean 'sign_flip'"],
    ),
    "attackers that do nothing": (
        ["--set", "clients.attackers=1"],
        ["clients.attack", "found 'none'", "sign_flip"],
    ),
    "more attackers than clients": (
        ["--set", "clients.attackers=9", "--set", "clients.attack=sign_flip"],
        ["clients.attackers", "found 9", "at most 4"],
    ),
    "a model that is not there": (["--set", "model.name=./none"], ["model.name", "'./none'"]),
    "a folder that is no model": (["--set", "model.name=./empty"], ["model.name", "'./empty'"]),
    "no tokens": (["--set", "model.max_length=0"], ["model.max_length", "found 0"]),
    "seed below 0": (["--set", "seed=-1"], ["seed", "found -1"]),
    "no steps": (["--set", "train.steps=0"], ["train", "'steps': 0", "above 0"]),
    "workers below 0": (["--set", "launch.workers=-1"], ["launch.workers", "found -1"]),
    "no threads": (["--set", "launch.threads=0"], ["launch.threads", "found 0"]),
    "epsilon 0": ([*PRIVATE, "--set", "privacy.epsilon=0.0"], ["privacy.epsilon", "found 0.0"]),
    "delta 0": ([*TARGET, "--set", "privacy.delta=0.0"], ["privacy.delta", "found 0.0"]),
    "delta above 1 / n": (
        [*TARGET, "--set", "privacy.delta=0.5"],
        ["client 0", "delta 0.5", "1/56"],
    ),
    "epsilon out of reach": (
        [*PRIVATE, "--set", "privacy.epsilon=1e-7", "--set", "privacy.delta=1e-3"],
        ["epsilon 1e-07", "more than 1000"],
    ),
    "epsilon and noise": (
        [*TARGET, "--set", "privacy.noise_multiplier=1.0"],
        ["privacy", "exactly one of epsilon and noise_multiplier"],
    ),
    "neither epsilon nor noise": (PRIVATE, ["exactly one of epsilon and noise_multiplier"]),
    "NaN noise": (
        [*PRIVATE, "--set", "privacy.noise_multiplier=nan"],
        ["privacy.noise_multiplier", "found nan"],
    ),
    "a claim by the central limit theorem": (
        [*TARGET, "--set", "privacy.accountant=gdp"],
        ["privacy.accountant", "found 'gdp'", "'prv'"],
    ),
    "no clip": (
        [*PRIVATE, "--set", "privacy.noise_multiplier=1.0", "--set", "privacy.clip=0.0"],
        ["privacy.clip", "found 0.0"],
    ),
    "tensors that hooks cannot see": (
        [*PRIVATE, "--set", "privacy.noise_multiplier=1.0", "--set", "adapter.name=miss"],
        ["trained tensor", "miss", "adapter.name = 'lora'"],
    ),
    "a rule that is not linear": (
        [
            *["--method", "median", "--set", "privacy.unit=client"],
            *["--set", "privacy.noise_multiplier=1.0"],
        ],
        ["method", "Median", "not linear", "fedavg"],
    ),
    "data that are not there": (
        ["--set", "task.name=hub", "--set", "task.options.path=./none"],
        ["task.options", "'./none'", "cannot be loaded"],
    ),
    "data without a path": (["--set", "task.name=hub"], ["task.options.path", "missing"]),
    "only newcomers": (
        ["--set", "evaluate.personal=true", "--set", "clients.newcomers=4"],
        ["clients.newcomers", "found 4", "at most 3"],
    ),
    "newcomers whom nobody measures": (
        ["--set", "clients.newcomers=1"],
        ["clients.newcomers", "found 1", "evaluate.personal"],
    ),
    "more clients wanted than train": (
        [
            *["--set", "evaluate.personal=true", "--set", "clients.newcomers=3"],
            *["--set", "clients.min_train_nodes=2"],
        ],
        ["clients.min_train_nodes", "found 2", "at most 1", "less clients.newcomers"],
    ),
    "own rows of a private run": (
        [
            *["--set", "evaluate.personal=true", "--set", "privacy.unit=client"],
            *["--set", "privacy.noise_multiplier=1.0"],
        ],
        ["evaluate.personal", "found True", 'privacy.unit = "client"', "without noise"],
    ),
    "groups of rows that are the clients' own": (
        ["--set", "clients.split=own", "--set", "evaluate.rows=own_groups"],
        ["evaluate.rows", "found 'own_groups'", "'share'", "clients.split = 'own'"],
    ),
    "all rows held back": (["--set", "evaluate.holdout=1"], ["evaluate.holdout", "less than 1"]),
    "unknown backend": (["--backend", "rey"], ["launch.backend", "'rey'", "'ray'"]),
    "sums of a rule that has none": (
        ["--method", "median", "--set", "launch.sums=workers"],
        ["launch.sums", "found 'workers'", "'server'", "median", "single updates"],
    ),
    "no such device": (["--set", "launch.device=cuda"], ["launch.device", "'cuda'"]),
    "a --set without a value": (["--set", "rounds"], ["--set", "'rounds'", "KEY=VALUE"]),
    "a --set into a number": (["--set", "rounds.x=1"], ["rounds"]),
    "texts for the mixer": (["--set", "model.name=mixer"], ["mixer", "images", "texts"]),
    "texts for a ViT": (["--set", "model.name=tiny_vit"], ["'tiny_vit'", "images", "texts"]),
    "no factors to add to the base": (
        ["--method", "fedex_lora", "--set", "adapter.name=miss"],
        ["FedExLora adds products of factors to the base", "no factors A and B"],
    ),
    "a base that cannot change": (
        ["--method", "flora", "--set", "model.dtype=bfloat16"],
        ["model.dtype", "'bfloat16'", "'float32' with flora, which changes the base"],
    ),
    "a quantised base that cannot change": (
        ["--method", "fedex_lora", "--set", "model.quantise=4bit"],
        ["model.quantise", "'4bit'", "'none' with fedex_lora"],
    ),
    "a negative rank of the residual": (
        ["--method", "fedex_lora", "--set", "options.residual_rank=-1"],
        ["options.residual_rank", "found -1", "greater than or equal to 0"],
    ),
    "client-level privacy of a rule that is not linear": (
        [
            "--method",
            "flora",
            "--set",
            "privacy.unit=client",
            "--set",
            "privacy.noise_multiplier=1.0",
        ],
        ["Flora", "not linear"],
    ),
    "sums of what needs single updates": (
        ["--method", "fedex_lora", "--set", "launch.sums=workers"],
        ["launch.sums", "fedex_lora", "needs single updates"],
    ),
    "no factor to freeze": (
        ["--method", "ffa_lora", "--set", "adapter.name=miss"],
        ["FfaLora", "no factors"],
    ),
}


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that a user got wrong."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip()]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("fedlora: ") and "Traceback" not in shown.err
    assert shown.out == ""
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "no such device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here, so asking for it is no mistake")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    arguments, wanted = CASES[name]
    line = fails(["run", "tiny", *arguments], capsys)
    for part in wanted:
        assert part in line, line


def test_malformed_toml_gives_line_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "broken.toml"
    recipe.write_text("# a question?\nrounds = 2\nseed = = 3\n")
    line = fails(["run", str(recipe)], capsys)
    assert "broken.toml" in line and "line 3" in line and "column" in line


def test_missing_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'tiny'" in fails(["run", "tinny"], capsys)
    assert "none.toml" in fails(["run", str(tmp_path / "none.toml")], capsys)


def test_a_folder_that_holds_another_run_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rounds.jsonl").write_text("precious\n")
    line = fails(["run", "tiny", "--out", str(tmp_path)], capsys)
    assert "--out" in line and "not empty" in line
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]
    assert (tmp_path / "rounds.jsonl").read_text() == "precious\n"
    fails(["compare", "tiny", "--out", str(tmp_path)], capsys)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = fails(["run", "tiny", "--out", str(tmp_path / "file" / "run")], capsys)
    assert "--out" in line and "cannot write" in line


def test_data_that_was_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlora.tasks import load_task

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    getattr(load_task, "cache_clear", lambda: None)()
    line = fails(["run", "tiny", "--set", "task.name=vader", "--set", "clients.split=iid"], capsys)
    assert "fedlora fetch vader" in line
    line = fails(["fetch", "vader"], capsys)
    assert "vaderSentiment-3.3.2.tar.gz" in line and "SHA-256" in line


GOOD = '{"text": "fine words", "label": 1}\n{"text": "other words", "label": 0}\n'
FILES = {
    "a line that is no JSON": (GOOD + "nonsense {\n", ["cannot be loaded", "row 2"]),
    "no such column": (GOOD.replace("label", "mark"), ["no column 'label'", "mark"]),
    "no value": (GOOD.replace('"label": 1', '"label": null'), ["'label'", "no value in row 0"]),
    "nothing at all": ("", ["task.options", "cannot be loaded"]),
}


@pytest.mark.parametrize("name", FILES)
def test_data_of_ones_own_that_are_broken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, wanted = FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text(text)
    options = {"name": "hub", "options.path": str(tmp_path / "mine"), "options.test": '""'}
    settings = [word for k, v in options.items() for word in ("--set", f"task.{k}={v}")]
    line = fails(["run", "tiny", *settings, "--set", "clients.split=iid"], capsys)
    for part in wanted:
        assert part in line, line


def test_a_mistake_in_one_method_stops_a_comparison_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("# why?\n[methods.lora_fair.options]\nridge = -1.0\n")
    out = tmp_path / "out"
    line = fails(["compare", str(recipe), "--out", str(out)], capsys)
    assert "ridge" in line and not out.exists()


def test_methods_that_want_other_pools_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('# why?\ntask.name = "tweets"\n[methods.lora_fair.clients]\nnumber = 3\n')
    line = fails(["compare", str(recipe), "--out", str(tmp_path / "out")], capsys)
    assert "lora_fair-seed0" in line and not (tmp_path / "out").exists()
