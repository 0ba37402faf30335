"""Scores by setting: what counts as a setting, and when there is a figure of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from simulations import settings_figure
from simulations.report import flattened
from simulations.run_folders import Run
from simulations.settings_figure import MOST, grid, settings
from simulations.tables import write

PRIVATE = {"unit": "example", "delta": 1e-5, "clip": 1.0}


def run(method: str, seed: int, accuracy: float, **tables: Mapping[str, Any]) -> Run:
    """A run of one round, in memory."""
    config = {"method": method, "seed": seed, "rounds": 1, **tables}
    ends = [{"round": number, "groups": {"a": value}} for number, value in enumerate((0, accuracy))]
    return Run(Path(f"{method}-{seed}-{json.dumps(flattened(config))}"), config, ends, {}, {}, {})


def two_rules(key: str, *values: object) -> list[Run]:
    """FedAvg and FFA-LoRA, each at a rate of its own; two seeds at each value of a key."""
    return [
        run(
            method,
            seed,
            rate + place / 10 + seed / 100,
            clients={key: value},
            train={"learning_rate": rate},
            options={"ridge": rate},
        )
        for method, rate in (("fedavg", 0.1), ("ffa_lora", 0.2))
        for place, value in enumerate(values)
        for seed in (0, 1)
    ]


def test_a_setting_is_what_differs_within_a_method() -> None:
    found, scores = settings(two_rules("alpha", 1.0, 0.1))
    assert found == [{"clients.alpha": 1.0}, {"clients.alpha": 0.1}]
    assert scores["fedavg"] == {0: pytest.approx([0.1, 0.11]), 1: pytest.approx([0.2, 0.21])}
    assert scores["ffa_lora"] == {0: pytest.approx([0.2, 0.21]), 1: pytest.approx([0.3, 0.31])}


def test_a_rate_for_each_setting_is_no_setting_but_rates_alone_are() -> None:
    both = [
        run("fedavg", 0, 0.5, clients={"alpha": alpha}, train={"learning_rate": rate})
        for alpha, rate in ((1.0, 0.1), (0.1, 0.2))
    ]
    assert settings(both)[0] == [{"clients.alpha": 1.0}, {"clients.alpha": 0.1}]
    rates = [run("fedavg", 0, 0.5, train={"learning_rate": rate}) for rate in (0.1, 0.2)]
    assert settings(rates)[0] == [{"train.learning_rate": 0.1}, {"train.learning_rate": 0.2}]


def drawn(runs: list[Run], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure, before it is closed."""
    seen: list[Figure] = []
    sheet = settings_figure.sheet

    class Kept:
        def __init__(self, *size: Any) -> None:
            self.inner = sheet(*size)

        def __enter__(self) -> Figure:
            seen.append(self.inner.__enter__())
            return seen[0]

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

    monkeypatch.setattr(settings_figure, "sheet", Kept)
    assert grid(runs, path)
    return seen[0]


def test_numbers_stand_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(two_rules("alpha", 1.0, 0.1), tmp_path / "settings.png", monkeypatch).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "0.1"]
    assert list(axes.get_xticks()) == [1, 0] and axes.get_xlabel() == "clients.alpha"
    first, second = axes.lines
    assert list(first.get_ydata()) == pytest.approx([0.205, 0.105])
    assert list(second.get_ydata()) == pytest.approx([0.305, 0.205])
    assert max(first.get_xdata()) < max(second.get_xdata()) < 1.5


def test_so_do_several_numbers_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        run("fedavg", 0, 0.5, clients={"number": number}, train={"steps": steps})
        for number, steps in ((40, 1), (2, 20), (8, 5))
    ]
    axes = drawn(runs, tmp_path / "settings.png", monkeypatch).axes[0]
    found = dict(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))
    assert [found[place].get_text() for place in sorted(found)] == [
        "number 2\nsteps 20",
        "number 8\nsteps 5",
        "number 40\nsteps 1",
    ]


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(two_rules("alpha", 1.0), id="one setting"),
        pytest.param(two_rules("alpha", *range(MOST + 1)), id="too many"),
        pytest.param(
            [run("fedavg", 0, 0.5, privacy={**PRIVATE, "epsilon": e}) for e in (1.0, 8.0)],
            id="epsilon alone, which has its own figure",
        ),
    ],
)
def test_what_has_no_such_figure(runs: list[Run], tmp_path: Path) -> None:
    assert not grid(runs, tmp_path / "settings.png")
    assert not (tmp_path / "settings.png").exists()


def test_a_report_has_it(tmp_path: Path) -> None:
    assert tmp_path / "settings.png" in write(two_rules("split", "iid", "group"), tmp_path)
    assert (tmp_path / "settings.png").read_bytes().startswith(b"\x89PNG")
