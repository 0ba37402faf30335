"""Runs on Ray that are told to stop, by the command; most of them under ``-m slow``."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from simulations import launch
from simulations.chaos_runs import QUICK
from simulations.cli import main
from simulations.descendants import adopt, descendants, end_descendants
from simulations.progress import Progress
from simulations.recipe import load
from tests.simulations.ray_stops import ROUNDS, stopped
from tests.simulations.test_agreement import bits

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its processes unread
]


def test_nothing_stays_behind_of_a_ray_that_was_starting(tmp_path: Path) -> None:
    end = stopped(tmp_path / "run", signal.SIGINT, 0, 0.3, ray_only=True)
    assert end.good, end
    assert end.said.endswith("fedlora: stopped\n") and "Traceback" not in end.said


def test_orphans_of_orphans_are_found_and_ended() -> None:
    adopt(True)
    try:
        shell = "sleep 600 & (sleep 600 & sleep 600 & echo ready; wait) & wait"
        child = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        known = set(descendants())
        assert len(known) >= 5
        child.kill()
        child.wait()
        child.stdout.close()
        assert set(descendants()) == known - {child.pid}
        end_descendants()
        assert not descendants()
    finally:
        adopt(False)


@pytest.mark.slow
def test_at_whatever_time_it_ends_in_time_and_goes_on_the_same(tmp_path: Path) -> None:
    """Also as nothing is written yet; it may go on in process, which makes no difference."""
    sets = [*QUICK, f"rounds={ROUNDS}"]
    whole = launch.run(load("tiny").resolve(None, sets), tmp_path / "whole", Progress())
    drawn = random.Random(0)
    for number in range(8):
        out = tmp_path / str(number)
        asked = (signal.SIGINT, signal.SIGTERM)[number % 2]
        records = drawn.randint(1, ROUNDS // 2) if number < 5 else 0
        end = stopped(out, asked, records, drawn.uniform(0, 0.1 if records else 12))
        assert end.good, (number, end)
        if (out / "config.toml").exists():
            again = ["--backend", "inprocess"] if number % 4 else []
            assert main(["run", "--resume", str(out), *again]) == 0
            assert bits(out) == bits(whole), number
