"""Runs whose clients keep something, and what clients measure on rows of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from clients import local
from clients.resident import Resident
from fedlora.adapters import load_into
from fedlora.seeds import ambient, numpy_generator
from simulations import launch
from simulations.progress import Progress
from simulations.recipe import load

torch.set_num_threads(1)

# query and value of 2 layers are 32 to 32, r = 4: 4 layers of 4 x 32 numbers for A
OF_A = 4 * 4 * 4 * 32
NAMES = ("global", "personal", "new global", "new personal")
QUICK = ("train.steps=2", "train.batch_size=4", "model.max_length=12", "task.rows_per_group=40")


def rounds(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_sends_a_alone_and_saves_b_as_it_was(tmp_path: Path) -> None:
    """And what a run leaves with its clients does not reach the next one on the same grid."""
    both = launch.compare(
        load("tiny"), ["fedsa_lora"], [1, 0], QUICK, tmp_path / "both", Progress()
    )
    first = both / "fedsa_lora-seed0"
    alone = launch.run(load("tiny").resolve("fedsa_lora", QUICK), tmp_path / "alone", Progress())
    assert rounds(first) == rounds(alone)
    one, other = adapter(first), adapter(alone)
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert all(not value.any() for key, value in one.items() if "lora_B" in key)
    for record in rounds(alone)[1:]:
        assert (record["bytes_up"], record["bytes_down"]) == (4 * OF_A, 4 * OF_A)
        assert record["aggregation_error"] is None
        assert (record["clients"], record["failures"]) == ([0, 1, 2, 3], [])
    assert len({record["loss"] for record in rounds(alone)}) == 3


OWN = ("evaluate.personal=true", "evaluate.every=1", "clients.number=5", "clients.newcomers=2")


def test_what_no_noise_covers_is_not_written(tmp_path: Path) -> None:
    """Whole clients are private in the server's adapter, not in what they keep."""
    private = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "rounds=1")
    config = load("tiny").resolve("fedsa_lora", [*QUICK, *private])
    folder = launch.run(config, tmp_path / "run", Progress())
    assert rounds(folder)[-1]["merged"]
    assert not (folder / "personal").exists()


def test_every_client_measures_on_rows_of_its_own(tmp_path: Path) -> None:
    """The last round's numbers, by hand: each client's rows, the global adapter, its own steps."""
    changes = (*QUICK, *OWN, "evaluate.fine_tune_steps=3")
    config = load("tiny").resolve(None, changes)
    folder = launch.run(config, tmp_path / "run", Progress())
    records = rounds(folder)
    assert [set(record["own_rows"]) for record in records] == [set(NAMES)] * 3
    assert [record["clients"] for record in records[1:]] == [[0, 1, 2]] * 2
    here = Resident(config.client())
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    for client in range(5):
        rows, prefix = here.held_back(client), "new " if client > 2 else ""
        load_into(here.model.trained, adapter_by_key(here, folder))
        losses[prefix + "global"].append(loss_of(here, rows))
        stream = (0, "client", client, "round", 2, "fine-tuning")
        train = config.train.model_copy(update={"steps": 3})
        moving = list(here.moving(("A", "B")).values())
        with ambient(*stream, "dropout"):
            draws = numpy_generator(*stream, "batches")
            local.train(here.model.module, moving, here.rows(client), "classify", train, draws)
        losses[prefix + "personal"].append(loss_of(here, rows))
    for name, found in losses.items():
        said = records[-1]["own_rows"][name]
        assert said["clients"] == len(found)
        assert said["loss"]["mean"] == pytest.approx(sum(found) / len(found), rel=1e-12)
        assert said["loss"]["worst"] == max(found)
        assert said["loss"]["spread"] == pytest.approx(numpy.std(found), rel=1e-9)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["own_rows"] == records[-1]["own_rows"]
    assert not (folder / "personal").exists()


def test_measuring_changes_nothing_that_trains(tmp_path: Path) -> None:
    """With the same rows held back, whether clients measure often or rarely, or fine-tune."""
    found = []
    for number, changes in enumerate((["evaluate.every=1"], ["evaluate.fine_tune_steps=0"])):
        config = load("tiny").resolve(None, [*QUICK, "evaluate.personal=true", *changes])
        found.append(launch.run(config, tmp_path / f"{number}", Progress()))
    often, rarely = (rounds(folder) for folder in found)
    assert [bool(record["own_rows"]) for record in often] == [True] * 3
    assert [bool(record["own_rows"]) for record in rarely] == [False, False, True]
    last = rarely[-1]["own_rows"]
    assert last["global"] == last["personal"] == often[-1]["own_rows"]["global"]
    for record in [*often, *rarely]:
        del record["own_rows"]
    assert often == rarely
    one, other = map(adapter, found)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_clients_own_adapter_is_what_it_measured_and_is_saved(tmp_path: Path) -> None:
    """FedSA-LoRA: (mean A, own B, own heads), in ``personal/CLIENT``; newcomers have none."""
    config = load("tiny").resolve("fedsa_lora", [*QUICK, *OWN])
    folder = launch.run(config, tmp_path / "run", Progress())
    assert sorted(path.name for path in (folder / "personal").iterdir()) == ["0", "1", "2"]
    here, shared, losses = Resident(config.client()), adapter(folder), []
    for client in range(3):
        mine = load_file(folder / "personal" / str(client) / "adapter_model.safetensors")
        assert mine.keys() == shared.keys()
        for key, value in mine.items():
            assert torch.equal(value, shared[key]) == ("lora_A" in key), key
        load_into(here.model.trained, {key: mine[key] for key in here.first})
        losses.append(loss_of(here, here.held_back(client)))
        assert json.loads((folder / "personal" / str(client) / "adapter_config.json").read_text())
    said = rounds(folder)[-1]["own_rows"]
    assert said["personal"]["loss"]["mean"] == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert said["new personal"]["loss"] != said["new global"]["loss"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the collector
def test_what_clients_keep_and_measure_is_the_same_on_ray(tmp_path: Path) -> None:
    found = []
    for number, backend in enumerate(("inprocess", "ray")):
        where = (f"launch.backend={backend}", "launch.workers=2", "launch.pack=2")
        config = load("tiny").resolve("fedsa_lora", [*QUICK, *OWN, *where])
        folder = launch.run(config, tmp_path / f"{number}", Progress())
        own = sorted(folder.glob("personal/*/adapter_model.safetensors"))
        found.append((rounds(folder), adapter(folder).keys(), [path.read_bytes() for path in own]))
    assert len(found[0][2]) == 3
    assert found[0] == found[1]


def adapter_by_key(here: Resident, folder: Path) -> dict[str, torch.Tensor]:
    saved = adapter(folder)
    return {key: saved[key] for key in here.first}


def loss_of(here: Resident, rows: local.Rows) -> float:
    order = numpy.arange(len(rows))
    seen = local.evaluate(here.model.module, rows, order, 0 * order, "classify", here.config.train)[
        0
    ]
    return seen.loss / seen.examples
