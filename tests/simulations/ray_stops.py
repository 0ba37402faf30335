"""Runs on Ray that are told to stop: how they end, and whether anything of them stays behind.

``python -m tests.simulations.ray_stops 20`` stops twenty at random times, with a line for each.
Ctrl-C goes to the whole foreground group, as a terminal sends it; SIGTERM to the command alone.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from simulations.chaos_kills import STOPPED
from simulations.chaos_runs import PATIENCE, QUICK

MARK = "FEDLORA_STOPPED_RUN"  # in the environment of all that a run starts
LEFT = 5.0  # seconds until what was started must be gone as well
ROUNDS = 40
SETS = [word for change in (*QUICK, f"rounds={ROUNDS}") for word in ("--set", change)]
RUN = [sys.executable, "-m", "simulations.cli", "run", "tiny", *SETS]


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        asked: the signal.
        code: its exit code.
        seconds: from the signal to the end.
        left: command lines of processes that were still there after ``LEFT`` seconds.
        said: what it wrote to stderr.
    """

    asked: signal.Signals
    code: int
    seconds: float
    left: list[str]
    said: str

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.code == 128 + self.asked and self.seconds <= STOPPED and not self.left


def stopped(
    out: Path, asked: signal.Signals, records: int, wait: float, ray_only: bool = False
) -> End:
    """Stop a run ``wait`` seconds after it has begun, or after it wrote so many records.

    With ``ray_only``, so long after the first process of Ray is there.
    """
    mark = uuid.uuid4().hex
    argv = [*RUN, "--backend", "ray", "--workers", "2", "--out", str(out)]
    # with a group of its own, and listening to Ctrl-C even where this process does not
    child = subprocess.Popen(
        argv,
        env={**os.environ, MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        begun(child, out, records)
        while ray_only and child.poll() is None and len(running(mark)) < 2:
            time.sleep(0.01)
        time.sleep(wait)
        sent = time.monotonic()
        (os.killpg if asked == signal.SIGINT else os.kill)(child.pid, asked)
        _, said = child.communicate(timeout=PATIENCE)
        seconds = time.monotonic() - sent
        return End(asked, child.returncode, seconds, left(mark), said)
    finally:
        if child.poll() is None:
            child.kill()
        for process in running(mark):
            os.kill(process, signal.SIGKILL)


def begun(child: subprocess.Popen[str], out: Path, records: int) -> None:
    """Wait until so many records are written; at once if none is asked for."""
    deadline = time.monotonic() + PATIENCE
    lines = out / "rounds.jsonl"
    while records and time.monotonic() < deadline and child.poll() is None:
        if lines.exists() and lines.read_bytes().count(b"\n") >= records:
            return
        time.sleep(0.01)


def left(mark: str) -> list[str]:
    """The command lines of what is still running after ``LEFT`` seconds."""
    deadline = time.monotonic() + LEFT
    while (found := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(found.values())


def running(mark: str) -> dict[int, str]:
    """Processes with the mark in their environment, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = words.decode(errors="replace")[:120]
        except OSError:
            continue
    return found


def main(times: int) -> int:
    """Print a line for each; 1 if one did not end as it should."""
    drawn, bad = random.Random(0), 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(times):
            asked = (signal.SIGINT, signal.SIGTERM)[number % 2]
            wait = drawn.uniform(0.5, 15)
            end = stopped(Path(name) / str(number), asked, 0, wait)
            bad += not end.good
            ended = f"{end.code} in {end.seconds:.1f} s, left {end.left}"
            print(f"{asked.name} after {wait:.1f} s: {ended}")
            if not end.good:
                print(end.said)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
