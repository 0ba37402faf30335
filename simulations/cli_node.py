"""The command ``fedlora node``."""

from __future__ import annotations

from pathlib import Path

import click

from fedlora.errors import ConfigError


@click.command()
@click.option("--state", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option("--name", help="The actor's; trainer-HOST by default.")
@click.option("--address", metavar="HOST:PORT", help="Of a running Ray; else one is started.")
@click.option("--cpus", type=float, default=1.0, show_default=True, help="Of that Ray.")
@click.option("--gpus", type=float, default=0.0, show_default=True, help="A share of one, or some.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of torch.")
@click.option("--stop", is_flag=True, help="End the trainer of FILE.")
@click.option("--status", is_flag=True, help="Say how it is; exit code 1 if it cannot work.")
def node(
    state: Path,
    name: str | None,
    address: str | None,
    cpus: float,
    gpus: float,
    threads: int,
    stop: bool,
    status: bool,
) -> int:
    """Keep a trainer with its model on this machine, for the SuperNodes that name FILE.

    FILE is written when it is ready; it is for ``trainer`` in their --node-config.
    """
    from simulations.node import elsewhere, keeping

    state = state.absolute()
    if stop and status:
        raise ConfigError("node: found --stop and --status, allowed: one of them")
    if status:
        return elsewhere.status(state)
    if stop:
        elsewhere.stop(state)
    else:
        keeping.keep(state, name, address, cpus, gpus, threads)
    return 0
