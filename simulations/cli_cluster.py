"""The commands ``fedlora cluster ...``."""

from __future__ import annotations

from pathlib import Path

import click

from simulations.cli_options import Commands

COUNT = click.IntRange(min=1)


@click.group(cls=Commands)
def cluster() -> None:
    """Run on the machines of a Slurm or Kubernetes cluster."""


@cluster.command()
@click.argument("kind", metavar="slurm|kuberay")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipe", default="quickstart", show_default=True, help="What to run.")
@click.option("--nodes", type=COUNT, default=2, show_default=True)
@click.option("--cpus", type=COUNT, default=8, show_default=True, help="Of each node.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Likewise.")
@click.option("--memory", type=COUNT, default=16, show_default=True, help="Likewise, in GB.")
@click.option("--image", default="fedlora:latest", show_default=True, help="With kuberay.")
def init(kind: str, file: Path, recipe: str, **machines: int | str) -> None:
    """Write FILE, which starts a run there: for sbatch, or for kubectl apply."""
    from simulations.cluster.files import Machines, write

    write(kind, file, recipe, Machines(**machines))  # type: ignore[arg-type]
    click.echo(str(file))
