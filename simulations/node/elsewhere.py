"""``fedlora node --stop`` and ``--status``: a trainer that another process keeps."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import click

from fedlora.errors import FedloraError
from simulations.node.joining import joined
from simulations.node.keeping import end, pulse
from simulations.node.named import keeper, read

STOPS = 30.0  # seconds for a process to stop
ANSWERS = 30.0  # seconds for a trainer to say how it is


def stop(state: Path) -> None:
    """End the trainer of a state file, which goes too.

    Raises:
        ConfigError: there is no such file.
        FedloraError: the process that keeps it does not end.
    """
    number = keeper(state)
    if number is None:
        named = read(state)
        state.unlink()
        with suppress(FedloraError), joined(named, "--state"):
            end(named)
        click.echo(f"trainer: nobody kept that of {state}; the file is gone")
        return
    os.kill(number, signal.SIGTERM)
    until = time.monotonic() + STOPS
    while keeper(state) == number:
        if time.monotonic() > until:
            raise FedloraError(f"--stop: process {number} still runs after {STOPS:g} s")
        time.sleep(0.1)
    click.echo(f"trainer: that of {state} has ended")


def status(state: Path) -> int:
    """Say how the trainer of a state file is; 0 if it can work, else 1.

    Raises:
        ConfigError: there is no such file, or nobody answers where it says.
    """
    named = read(state)
    with joined(named, f"--state: {state}") as trainer:
        found = pulse(trainer, ANSWERS)
    said = f"trainer {named.name!r} at {named.address}"
    if found is None or found.trouble:
        click.echo(f"{said}: cannot work: {found.trouble if found else 'it does not answer'}")
        return 1
    work = f"works since {found.seconds:.0f} s on one more" if found.at else "waits"
    click.echo(f"{said}: process {found.process}, {found.answered} messages answered, {work}")
    return 0
