"""How many clients go in a pack: for known shapes, and against what was measured."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from clients.pack_size import CPU, GPU, pack_size, width_of
from fedlora.adapters import attach
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.models import load_model
from simulations.bench_cohort import SIZES, name
from simulations.bench_inputs import LENGTH
from simulations.packing import suited
from simulations.recipe import load
from tests.clients.cohort_cases import pack

TABLE = Path(__file__).parents[2] / "results" / "bench" / "packs" / "table.csv"
WIDTHS = {"tiny": 64, "mid": 256, "minilm, 3 layers": 384}


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "expected"),
    [
        (4, 32, 64, 64),
        (16, 32, 64, 16),
        (4, 32, 256, 16),
        (1, 32, 384, 42),
        (4, 32, 384, 10),
        (16, 32, 384, 2),  # the quickstart
        (16, 128, 384, 1),
        (1, 1, 8, 64),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_known_shapes(batch: int, tokens: int, width: int, expected: int, private: bool) -> None:
    found = pack_size(batch_size=batch, tokens=tokens, width=width, numbers=40_000, private=private)
    assert found == expected


def test_gradients_of_rows_and_devices_have_their_limits() -> None:
    shape = {"batch_size": 4, "tokens": 1, "width": 1}
    million = {**shape, "numbers": 2**20}
    assert pack_size(**million, private=False) == 32 == CPU.trained // 2**20
    assert pack_size(**million, private=True) == 8
    assert pack_size(**shape, numbers=2**40, private=True) == 1
    assert pack_size(**million, private=False, device="cuda") == GPU.clients
    assert pack_size(**million, private=True, device="cuda") == 64


def test_the_width_is_the_hidden_one() -> None:
    assert width_of(pack("tiny_bert", [1]).trained) == 32


def test_a_small_matrix_between_fixed_factors_does_not_hide_it() -> None:
    base = load_model(ModelConfig(name="tiny_llama"), 0, "language")  # no head that tells it
    settings = AdapterConfig(name="lora_sb", rank=4, target_modules=("q_proj", "v_proj"))
    model = attach(base, settings, seed=0)
    assert width_of(model.trained) == 4
    assert width_of(model.fixed()) == 32
    config = load("tiny").resolve(
        "fed_sb", ["train.batch_size=64", "model.max_length=128", "clients.number=400"]
    )
    size, _ = suited(config, model.trained, "cpu", model.fixed())
    assert size == CPU.activation // (64 * 128 * 32) < 4


@pytest.mark.parametrize("kind", ["packs", "private packs"])
def test_the_size_was_never_slower_and_is_near_the_best(kind: str) -> None:
    """Of the sizes in the committed table, the largest that is not above the chosen one."""
    measured: dict[str, dict[int, float]] = defaultdict(dict)
    for line in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()):
        who, _, what = line["case"].rpartition(": ")
        of, _, size = what.rpartition(" of ")
        if of == kind:
            measured[who][int(size)] = float(line["ratio"])
    assert measured.keys() == {name(crowd) for crowd, _ in SIZES}
    for crowd, sizes in SIZES:
        gains = measured[name(crowd)]
        assert gains.keys() == set(sizes)
        chosen = pack_size(
            batch_size=crowd.batch_size,
            tokens=LENGTH,
            width=WIDTHS[crowd.label],
            numbers=40_000,
            private=kind != "packs",
        )
        gain = gains[max(size for size in sizes if size <= chosen)]
        assert gain >= 0.97, name(crowd)
        assert gain >= 0.85 * max(gains.values()), name(crowd)
