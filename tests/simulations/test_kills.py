"""Runs that are killed, stopped or out of room: a few here, all of them under ``-m slow``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from fedlora.faults import POINTS
from simulations.chaos_faults import QUICK
from simulations.chaos_kills import STOPPED
from simulations.stopping import GRACE, hearing, still_hearing


def faults(*options: str) -> list[dict[str, Any]]:
    """What chaos tells, from a process that has no threads yet; all of it must be survived."""
    argv = [sys.executable, "-m", "simulations.cli", "chaos", "--json", *options]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["faults"]
    return found


def test_a_few_kills_stops_and_full_disks_change_nothing() -> None:
    found = faults("--quick", "--only", "kills,signals,disk")
    names = [f"killed at {point}" for point in QUICK.points]
    names += ["SIGINT at any time", "SIGTERM at any time"]
    disks = ["the disk is full from a point on", "the disk is read-only from a point on"]
    assert [fault["name"] for fault in found] in (names, names + disks)  # where none can be mounted
    kills, ends = found[: len(QUICK.points)], found[len(QUICK.points) :]
    assert all(fault["seen"] == "1 died there, 1 ended as if they had not" for fault in kills)
    assert [fault["seen"].split(" after ")[0] for fault in ends[:2]] == [
        "ended with 130",
        "ended with 143",
    ]
    assert [fault["injected"] for fault in ends[2:]] in ([], [4, 3])  # one holds a file open


@pytest.mark.slow
def test_no_kill_no_stop_and_no_full_disk_changes_anything() -> None:
    """Every point in every round: 5 x 19 and the end; 20 signals at random times."""
    found = faults("--only", "kills,signals,disk")
    kills = [fault for fault in found if fault["name"].startswith("killed")]
    assert len(kills) == len(POINTS)
    assert sum(fault["injected"] for fault in kills) == 5 * (len(POINTS) - 1) + 1
    assert sum(fault["injected"] for fault in found if "any time" in fault["name"]) == 20


def test_the_process_ends_in_time_whatever_hangs() -> None:
    """Nothing that a command does, or fails to do, outlasts the second signal or the grace."""
    assert GRACE < STOPPED
    code = (
        "import os, signal, sys, threading, time\n"
        "from simulations import stopping\n"
        "stopping.GRACE = float(sys.argv[2])\n"
        "def stuck():\n"
        "    end = time.monotonic() + 600\n"
        "    while time.monotonic() < end:\n"
        "        try: time.sleep(1)\n"
        "        except KeyboardInterrupt: print('heard', flush=True)\n"
        "with stopping.hearing():\n"
        "    signals = [signal.SIGTERM] * int(sys.argv[1])\n"
        "    def send():\n"
        "        for one in signals:\n"
        "            time.sleep(0.3); os.kill(os.getpid(), one)\n"
        "    threading.Thread(target=send, daemon=True).start()\n"
        "    stuck()\n"
    )
    for signals, grace in ((1, "0.5"), (2, "600")):
        argv = [sys.executable, "-c", code, str(signals), grace]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (143, "heard\n"), done.stderr


def test_a_library_that_listens_itself_does_not_stay() -> None:
    """Ray sets a handler of its own when it starts."""
    before = signal.getsignal(signal.SIGTERM)
    with hearing() as heard:
        with still_hearing():
            signal.signal(signal.SIGTERM, lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) == heard.hear
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_listens_already_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with hearing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
