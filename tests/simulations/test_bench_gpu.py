"""``fedlora bench gpu`` on a machine without one: toys on the CPU go all the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import MemoryLimitError
from fedlora.models.shapes import MINILM, SMOLLM2, random_model
from simulations import bench_gpu, bench_gpu_round
from simulations.bench_gpu import AT, CELLS, TARGET, TOYS, fitting, fuller
from simulations.bench_gpu_round import Round, frozen
from simulations.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus, of its own hooks
CPU = torch.device("cpu")
WAYS = ("packs of {}", "packs of {}, of the base's own speed", "private packs of {}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--quick"], ["--device", "cuda"]])
def test_without_a_gpu_it_is_one_line(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "fedlora: bench gpu: found no CUDA device that torch sees, allowed: a machine with one, "
        "or --device cpu, which runs toys\n"
    )


@pytest.mark.slow
def test_toys_on_the_cpu_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "gpu", "--device", "cpu", "--pairs", "1", "--json", "--out", str(tmp_path)]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    expected = [
        f"{label}, K {clients}, b {rows}: {way.format(clients)}"
        for label in ("a toy BERT", "a toy Llama")
        for clients, rows in ((1, 1), (4, 2))
        for way in WAYS
    ]
    assert [row["case"] for row in document["rows"]] == expected
    for row in document["rows"]:
        assert (row["unit"], row["clock"], row["sense"]) == ("ms/client", "wall", "at least")
        assert row["ours"] > 0 and row["peer"] > 0 and row["allowed"] is None
    names = ("table.md", "table.csv", "ratios.png", "environment.json")
    assert all((tmp_path / name).stat().st_size for name in names)


def test_torch_transformers_and_peft_are_enough() -> None:
    code = (
        "import sys\n"
        "for name in ('flwr', 'ray', 'opacus', 'datasets', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from simulations import bench_gpu\n"
        "rows = bench_gpu.gpu(1, print, 'cpu', bench_gpu.TOYS[:1], [(2, 1)])\n"
        "print(len(rows), any('private' in row.case for row in rows))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 False"
    assert "private packs: left out, since Opacus is not installed" in done.stdout


def test_packs_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    together, sizes, room = bench_gpu_round.train_together, list[int](), [2]

    def full(module: Any, moving: Any, members: Sequence[Any], *given: Any) -> Any:
        sizes.append(len(members))
        if len(members) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return together(module, moving, members, *given)

    monkeypatch.setattr(bench_gpu_round, "train_together", full)
    here = Round.of(TOYS[0], 5, 1, CPU)
    assert (fitting(here, private=False), sizes) == (2, [5, 3, 2])
    room[0] = 0
    with pytest.raises(MemoryLimitError):
        fitting(here, private=False)
    said = list[str]()
    assert list(bench_gpu.lines(here, "five", False, 1, said.append)) == []
    assert said == ["five: left out, CUDA out of memory; a pack of 1 does not fit:"]


def test_the_limit_is_the_frozen_base_forwards_and_backwards() -> None:
    """Gradients pass through every block and end at the embeddings; no weight has one."""
    for subject in TOYS:
        bare, reached = frozen(subject, CPU), list[int]()
        assert not any(parameter.requires_grad for parameter in bare.parameters())
        ends = ("layer.0", "layers.0")
        block = next(m for name, m in bare.named_modules() if name.endswith(ends))
        block.register_full_backward_hook(lambda *given, seen=reached: seen.append(1))
        here = Round.of(subject, 3, 2, CPU)
        assert here.limit(bare, 2) == 3
        assert len(reached) == 2 * bench_gpu_round.STEPS  # packs of 2 and of 1
        assert all(parameter.grad is None for parameter in bare.parameters())


def test_memory_is_told_by_how_many_more_fit_in_ones() -> None:
    row = fuller("another client", [2.0], [10.0])
    assert (row.ours, row.peer, row.ratio, row.unit, row.sense) == (
        2.0,
        10.0,
        5.0,
        "MB",
        "at least",
    )


def test_peak_memory_is_what_was_held_while_working(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000)
    assert bench_gpu.peak(lambda: calls.append("work") or 1) == 3.0
    assert calls[-3:] == ["reset_peak_memory_stats", "work", "synchronize"]


def test_the_shapes_are_theirs() -> None:
    """Counted without memory; the tied output of a language model counts once."""
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in random_model(shape).module.parameters())
            for shape in (MINILM, SMOLLM2)
        ]
    assert counts == [22_713_216 + 2 * 384 + 2, 134_515_008]
    assert AT in CELLS and TARGET == 8.0


def test_other_benches_take_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cohort", "--device", "cpu"]) == 2
    assert "--device: found 'cpu', allowed: with bench gpu alone" in capsys.readouterr().err
