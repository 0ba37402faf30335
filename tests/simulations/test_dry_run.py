"""`fedlora run --dry-run`: what it says is what the run counts, and it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.models.tiny import tiny_tokenizer
from simulations import launch
from simulations.cli import main
from simulations.dry_run import dry_run
from simulations.dry_run_table import table
from simulations.forecast import Spread, in_turn, packs_of
from simulations.memory import Peak
from simulations.progress import Progress
from simulations.recipe import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus, of its own hooks
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-4")
CLIENTS = ("privacy.unit=client", "privacy.noise_multiplier=2.0", "privacy.delta=1e-2")
SOME = ("clients.number=8", "clients.fraction_train=0.4")
CASES = {
    "plain": (),
    "frozen A": ("method=ffa_lora",),
    "A sent along": ("method=ffa_lora", "options.send_frozen=true"),
    "some clients": ("method=lora_fair", *SOME, "rounds=3", "clients.min_train_nodes=3"),
    "packs": ("clients.number=8",),
    "private": ("method=ffa_lora", *PRIVATE),
    "private packs": (*PRIVATE, "clients.number=8", "launch.pack=3"),
    "whole clients": (
        *CLIENTS,
        *SOME,
        "privacy.sampling=fixed",
        "privacy.accountant=rdp",
        "method=ffa_lora",
    ),
    "a base that grows": ("method=flora", "rounds=3"),
    "a base that grows in factors": (
        "method=fedex_lora",
        *SOME,
        "rounds=4",
        "clients.min_train_nodes=3",
        "options.residual_rank=5",
    ),
    "no factors": ("adapter.name=miss", "clients.number=8"),
    "fixed factors": ("method=fed_sb", "clients.number=8"),
    "a language model": (
        "task.name=tweets_lm",
        "model.name=tiny_llama",
        'adapter.target_modules=["q_proj", "v_proj"]',
    ),
}


def resolved(*changes: str) -> RunConfig:
    return load("tiny").resolve(None, changes)


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_the_run_then_counts(tmp_path: Path, case: str) -> None:
    config = resolved(*CASES[case])
    found = dry_run(config)
    folder = launch.run(config, tmp_path / "run", Progress())
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    sent = found.traffic
    assert sent.exact
    assert (sent.up, sent.down) == (records[1]["bytes_up"], records[1]["bytes_down"])
    assert sent.total_up == summary["bytes_up"] > 0
    assert sent.total_down == summary["bytes_down"] > 0
    assert sent.clients == len(records[1]["clients"])
    assert found.pack == summary["pack"]
    assert found.trained_numbers * 4 * len(records[1]["clients"]) == sent.up
    assert found.rounds == summary["rounds"]
    times, timing = found.times, found.timing
    assert times and timing and found.missing is None
    assert min(timing.load, timing.step, timing.evaluate, times.training, times.evaluation) > 0
    assert times.total > times.start + times.training * found.rounds
    assert found.memory.measured and found.memory.worker >= 0 and found.memory.imports > 0
    assert found.memory.all_workers == found.memory.worker + found.memory.imports


def test_only_rounds_that_measure_cost_a_measurement() -> None:
    times = dry_run(resolved("rounds=5", "evaluate.held_out_every=3")).times
    assert times
    seconds = times.start + 5 * times.training + 3 * times.evaluation  # rounds 0, 3 and 5
    assert times.total == pytest.approx(seconds)


def test_poisson_samples_are_told_as_means() -> None:
    found = dry_run(resolved(*CLIENTS, *SOME, "rounds=3"))
    assert not found.traffic.exact
    assert found.traffic.clients == pytest.approx(3.2)
    assert found.traffic.total_up == pytest.approx(3 * 3.2 * 4 * found.trained_numbers)
    assert found.total_steps == pytest.approx(3 * 3.2 * 5)


def test_examples_and_steps_are_those_of_the_split() -> None:
    changes = ("clients.number=3", "clients.split=dirichlet", "clients.alpha=0.3", "seed=4")
    found = dry_run(resolved(*changes, "train.steps=0", "train.epochs=2", "train.batch_size=10"))
    task, parts = dealt(*changes)
    counts = sorted(len(part) for part in parts)
    steps = [2 * -(-count // 10) for count in counts]
    assert sum(counts) == len(task.train) and counts[0] < counts[2]
    assert found.examples == Spread(*counts)
    assert found.steps == Spread(*steps)
    assert found.total_steps == 2 * sum(steps)


def dealt(*changes: str) -> Any:
    from fedlora.partition import partition
    from fedlora.tasks import load_task

    config = resolved(*changes)
    task = load_task(config.task)
    return task, partition(task, config.clients, config.seed)


def test_the_noise_is_the_planned_one(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("privacy.unit=example", "privacy.epsilon=8.0", "privacy.delta=1e-3")
    noise = dry_run(resolved(*changes)).privacy
    sets = [word for change in changes for word in ("--set", change)]
    assert main(["privacy", "plan", "tiny", *sets, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["clients"]
    assert noise and noise.unit == "example" and noise.delta == 1e-3
    assert noise.noise_multiplier == Spread.of(client["noise_multiplier"] for client in planned)
    assert noise.epsilon == max(client["epsilon"] for client in planned) <= 8.0
    with pytest.raises(Exception, match="delta"):
        dry_run(resolved(*changes[:2], "privacy.delta=0.5"))


@pytest.mark.parametrize("private", [(), PRIVATE])
def test_nothing_is_written_and_nothing_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: tuple[str, ...], capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [word for change in (*private, "privacy.ledger=books") for word in ("--set", change)]
    argv = ["run", "tiny", "--dry-run", "--out", "out", "--profile", *(sets if private else ())]
    assert main([*argv, "--backend", "ray", "--workers", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "nothing was started" in printed.out
    assert "bytes up" in printed.out and "memory of a worker" in printed.out
    assert ("epsilon" in printed.out) == bool(private)
    assert main([*argv, "--backend", "ray", "--workers", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workers"] == 3 and found["traffic"]["exact"] is True
    assert found["memory"]["all_workers"] == 3 * (
        found["memory"]["worker"] + found["memory"]["imports"]
    )
    assert not list(tmp_path.iterdir())


def test_a_run_after_it_is_the_same_run(tmp_path: Path) -> None:
    config = resolved("clients.number=8")
    folders = [launch.run(config, tmp_path / "before", Progress())]
    dry_run(config)
    folders.append(launch.run(config, tmp_path / "after", Progress()))
    bits = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders]
    assert bits[0] == bits[1]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model with its weights, and the same with its configuration alone."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    settings = BertConfig(
        vocab_size=1000,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(settings).save_pretrained(str(whole))
    tiny_tokenizer().save_pretrained(str(whole))
    settings.save_pretrained(str(bare))
    return whole, bare


@pytest.mark.parametrize(
    "case", ["plain", "frozen A", "packs", "private", "whole clients", "fixed factors"]
)
def test_without_weights_it_says_what_shapes_tell(folders: tuple[Path, Path], case: str) -> None:
    changes = CASES[case]
    whole, bare = (dry_run(resolved(*changes, f"model.name={folder}")) for folder in folders)
    assert whole.missing is None and bare.missing and "cannot load" in bare.missing
    assert bare.times is None and bare.timing is None and not bare.memory.measured
    for name in ("base_numbers", "trained_numbers", "examples", "steps", "traffic", "privacy"):
        assert getattr(bare, name) == getattr(whole, name), name
    assert (bare.pack, bare.pack_because) == (whole.pack, whole.pack_because)
    own = bare.trained_numbers * (3 + (8 if case == "private" else 1))
    head = 16 * 2 + 2  # trained, beside the base's own
    each = 4 * 4 if case == "fixed factors" else 4 * (16 + 16)  # R, or A and B, of rank 4
    weights = bare.base_numbers + head + 4 * each
    assert bare.memory.worker == 4 * (weights + bare.pack * own)
    assert "not measured" in list(table(bare).columns[0].cells)


def test_what_is_missing_is_one_line(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, bare = folders
    mistakes = {
        f"model.name={bare / 'nowhere'}/x": "model.name: cannot load",
        "task.name=twets": "did you mean 'tweets'?",
        "model.name=tiny_brt": "did you mean 'tiny_bert'?",
        "adapter.rank=99": "adapter.rank: found 99",
        "launch.pack=3": "launch.pack: found 3",
    }
    for change, expected in mistakes.items():
        extra = ["--set", "adapter.name=miss"] if "pack" in change else []
        assert main(["run", "tiny", "--dry-run", "--set", change, *extra]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert expected in printed.err
    for folder in (whole, bare):  # what else is wrong comes first
        with pytest.raises(ConfigError, match=r"adapter\.rank: found 99"):
            dry_run(resolved(f"model.name={folder}", "adapter.rank=99"))
        with pytest.raises(ConfigError, match=r"model\.options"):
            dry_run(resolved(f"model.name={folder}", "model.options.layers=1"))


def test_memory_is_the_peak_since_the_watch_began() -> None:
    peak = Peak(private=False)
    numbers = torch.ones(20_000_000)  # 80 MB
    del numbers
    found = peak.found(workers=3, gpu=False)
    assert found.worker > 75e6 and found.gpu == 0
    assert found.all_workers == 3 * (found.worker + found.imports)
    assert Peak(private=False).found(workers=1, gpu=False).worker < 40e6


def test_jobs_go_to_whoever_is_free_first() -> None:
    assert in_turn([3.0, 1.0, 1.0, 2.0], 2) == 4.0  # 3 | 1 1, then 2
    assert in_turn([3.0, 1.0], 1) == 4.0
    assert in_turn([], 2) == 0.0
    assert packs_of([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert Spread.of([4, 1, 2, 9]) == Spread(1, 3.0, 9)
