"""Private runs end to end: what is promised, what the ledger holds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.budget import Proposal, release_of, train_within_budget
from clients.local import Rows
from clients.private import poisson_batches
from clients.resident import Resident
from fedlora.errors import PrivacyError
from fedlora.ledger import Ledger
from fedlora.privacy import PrivacyEvent, epsilon
from simulations import launch
from simulations.cli import main
from simulations.progress import Progress
from simulations.recipe import load

# Opacus warns of its own generator and of hooks that fire early
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PRIVATE = ("privacy.unit=example", "privacy.epsilon=4.0", "privacy.delta=1e-3")


def run(folder: Path, *overrides: str) -> Path:
    return launch.run(load("tiny").resolve(None, [*PRIVATE, *overrides]), folder, Progress())


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def events(folder: Path, client: int) -> list[PrivacyEvent]:
    return Ledger(folder / "ledger").events(client)


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "lora_fair"])
def test_a_private_run_spends_what_it_planned(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path / "run", f"method={method}")
    assert [record["clients"] for record in rounds(folder)[1:]] == [[0, 1, 2, 3]] * 2
    found = json.loads((folder / "privacy.json").read_text())
    assert found["unit"] == "one example of one client" and "simulation only" in found["claim"]
    for row in found["clients"]:
        spent = events(folder, row["client"])
        assert [event.steps for event in spent] == [5, 5]
        assert {event.sample_rate for event in spent} == {8 / row["examples"]}
        assert row["epsilon"] == row["planned"] == epsilon(spent, 1e-3, "prv")
        assert 0.95 * 4 < row["epsilon"] <= 4
        assert epsilon(spent, 1e-3, "pld") <= 4 + 1e-3
    assert found["epsilon"] == max(row["epsilon"] for row in found["clients"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["privacy"]["epsilon"] == found["epsilon"]


def test_composition_is_over_all_rounds(tmp_path: Path) -> None:
    """The epsilon of one round would stay the same for ever; the ledger's does not."""
    fixed = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
    config = load("tiny").resolve(None, [*fixed, "rounds=3"])
    folder = launch.run(config, tmp_path / "run", Progress())
    spent = events(folder, 0)
    one, three = epsilon(spent[:1], 1e-3, "prv"), epsilon(spent, 1e-3, "prv")
    assert len(spent) == 3 and three > 1.3 * one
    assert json.loads((folder / "privacy.json").read_text())["clients"][0]["epsilon"] == three


def test_same_seed_same_bits_and_noise_of_its_own(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / name, f"seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    bits = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders]
    assert bits[0] == bits[1] != bits[2]
    ledgers = [(folder / "ledger/client-0.jsonl").read_text() for folder in folders]
    assert ledgers[0] == ledgers[1] != ledgers[2]


@pytest.fixture
def here() -> Resident:
    fresh = Resident(load("tiny").resolve(None, PRIVATE).client())
    fresh.load(fresh.first)
    return fresh


def test_the_gate_closes_before_the_target_and_a_resend_is_free(
    here: Resident, tmp_path: Path
) -> None:
    config, ledger = here.config, Ledger(tmp_path)
    releases = []
    for number in range(1, 100):
        here.load(here.first)
        release = release_of(0, {"round": number}, here.first, here.rows(0))
        try:
            train_within_budget(
                here, 0, number, config, ("A", "B"), Proposal(1.0, tmp_path, release)
            )
        except PrivacyError as error:
            assert "client 0" in str(error) and "target 4" in str(error)
            break
        releases.append(release)
    spent = ledger.events(0)
    assert 1 < len(spent) == len(releases) < 99
    event = spent[0]
    assert epsilon(spent, 1e-3, "prv") <= 4 < epsilon([*spent, event], 1e-3, "prv")
    # the last message again: the same update, and no charge, though the budget is spent
    here.load(here.first)
    last = Proposal(1.0, tmp_path, releases[-1])
    train_within_budget(here, 0, len(releases), config, ("A", "B"), last)
    assert ledger.events(0) == spent
    # less noise than planned does not get past the client either
    with pytest.raises(PrivacyError, match="target 4"):
        cheap = Proposal(0.3, tmp_path / "new", "other")
        train_within_budget(here, 0, 1, config, ("A", "B"), cheap)
    assert Ledger(tmp_path / "new").events(0) == []


def test_the_noise_is_of_the_release(here: Resident) -> None:
    """Another message must not meet the same noise: the difference would bare the gradients."""

    def drawn(client: int, number: int, release: str) -> list[float]:
        _, noise = here.private_streams(client, number, here.config, release)
        found: list[float] = torch.randn(8, generator=noise).tolist()
        return found

    first = drawn(0, 1, "one")
    assert first == drawn(0, 1, "one")
    others = [drawn(0, 1, "another"), drawn(1, 1, "one"), drawn(0, 2, "one")]
    assert all(first != other for other in others)
    found = []
    for release in ("one", "one", "another"):
        here.load(here.first)
        done = here.train_privately(0, 1, here.config, ("B",), 1.0, release)
        found.append({key: tensor.tobytes() for key, tensor in _arrays(done.tensors).items()})
    assert found[0] == found[1]
    assert all(found[0][key] != found[2][key] for key in found[0])


def test_the_batches_are_of_the_release_too(here: Resident) -> None:
    """Accountants add up samples drawn by themselves; one sample told of twice costs more."""

    def drawn(release: str) -> list[list[int]]:
        batches, _ = here.private_streams(0, 1, here.config, release)
        return list(poisson_batches(100, here.config.train, batches))

    assert drawn("one") == drawn("one") != drawn("another")


def test_the_release_is_of_the_examples_too(here: Resident) -> None:
    """Under the same noise, another data set would show the difference of the gradients."""
    first, second = here.rows(0), here.rows(1)
    fewer = Rows(first.inputs, torch.cat([1 - first.labels[:1], first.labels[1:]]))
    found = {release_of(0, {}, here.first, rows) for rows in (first, second, fewer, here.rows(0))}
    assert len(found) == 3


def test_nothing_leaves_when_the_ledger_cannot_be_written(here: Resident, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivacyError, match="ledger"):
        proposal = Proposal(1.0, tmp_path / "file" / "ledger", "release")
        train_within_budget(here, 0, 1, here.config, ("A", "B"), proposal)


def _arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: tensor.numpy() for key, tensor in tensors.items()}


REFUSED = {
    "an adapter that hooks cannot see": (["adapter.name=miss"], ["miss"]),
    "delta above 1/n": (["privacy.delta=0.1"], ["client 0", "delta 0.1"]),
    "epsilon and noise": (["privacy.noise_multiplier=1.0"], ["exactly one of epsilon"]),
    "epsilon without a unit": (["privacy.unit=none"], ["exactly one of epsilon"]),
    "the gdp accountant": (["privacy.accountant=gdp"], ["privacy.accountant", "'prv'"]),
    "epsilon 0": (["privacy.epsilon=0.0"], ["privacy.epsilon", "found 0.0"]),
    "an epsilon out of reach": (["privacy.epsilon=1e-9"], ["1e-09"]),
    "another unit": (["privacy.unit=row"], ["privacy.unit", "'example'"]),
    "clients drawn under unit example": (["privacy.sampling=none"], ["no sampling with unit"]),
    "a shared noise of clients": (
        ["privacy.unit=client", "privacy.shared_noise=true"],
        ["no shared_noise with unit"],
    ),
    "a rule that is not linear": (
        ["privacy.unit=client", "method=lora_fair"],
        ["LoraFair is not linear"],
    ),
    "prv for samples of fixed size": (
        ["privacy.unit=client", "privacy.sampling=fixed"],
        ['accountant = "rdp" with sampling = "fixed"'],
    ),
    "an adaptive clip of few clients": (
        ["privacy.unit=client", "privacy.adaptive_clip=true"],
        ["adaptive clip", "more clients in a round"],
    ),
    "delta above one over the clients": (
        ["privacy.unit=client", "privacy.delta=0.25"],
        ["delta 0.25 is not below 1/4"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, wanted = REFUSED[name]
    sets = [word for change in (*PRIVATE, *overrides) for word in ("--set", change)]
    assert main(["run", "tiny", *sets, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error
    for part in wanted:
        assert part.lower() in error.lower(), error
    assert not list((tmp_path / "run").glob("*"))


def test_plan_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [word for change in PRIVATE for word in ("--set", change)]
    figure = tmp_path / "plan.png"
    assert main(["privacy", "plan", "tiny", *sets, "--json", "--figure", str(figure)]) == 0
    rows = json.loads(capsys.readouterr().out)["clients"]
    wanted = ["client", "examples", "sample_rate", "noise_multiplier", "steps", "epsilon", "delta"]
    assert [list(row) for row in rows] == [wanted] * 4 and figure.exists()
    folder = run(tmp_path / "run")
    noise = [events(folder, client)[0].noise_multiplier for client in range(4)]
    assert noise == [row["noise_multiplier"] for row in rows]
    assert main(["privacy", "report", str(folder)]) == 0
    text = capsys.readouterr().out
    for part in ("one example of one client", "Poisson", "add or remove", "Not covered", "pld"):
        assert part in text
    assert (folder / "privacy.png").exists()
    assert main(["privacy", "report", str(tmp_path)]) == 2
    assert "privacy.json" in capsys.readouterr().err
