"""The commands ``fedlora deploy ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simulations.cli_options import Commands, as_json, out_folder, resume, settings


def machines(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """Hosts separated by commas; several nodes may share one."""
    return [host.strip() for host in value.split(",")] if value is not None else []


folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(cls=Commands)
def deploy() -> None:
    """Run recipes on many machines, on Flower's SuperLink and SuperNodes."""


@deploy.command()
@folder
@click.option("--nodes", type=int, required=True, help="How many nodes train.")
@click.option("--hosts", callback=machines, metavar="A,B", help="SuperLink's; then each node's.")
@click.option("--port", type=int, default=9092, help="Of the SuperLink; nodes have those after it.")
@click.option("--days", type=int, default=365, help="For which the certificates hold.")
@click.option("--trainer", is_flag=True, help="A resident trainer beside each node.")
@click.option("--data", default="", metavar="PATH", help="A node's own rows there; {node} in it.")
def init(**given: Any) -> None:  # Any: as commands.init declares them
    """Write certificates, keys, start scripts and units for a deployment into DIR."""
    from simulations.deploy import commands

    commands.init(**given)


@deploy.command()
@folder
@click.option("--node", type=int, help="Look at what node K needs, on its own machine.")
@click.option("--superlink", is_flag=True, help="Look at what the SuperLink needs to start.")
@click.option("--recipe", help="Is its data and model here too?")
@settings
@click.option("--wait", type=float, default=0.0, help="Seconds for a dead node to be missed.")
@click.option("--quiet", is_flag=True, help="Print what is wrong alone.")
@as_json
def check(**given: Any) -> int:  # Any: as commands.check declares them
    """Say what is wrong with the deployment in DIR; exit code 1 if anything is."""
    from simulations.deploy import commands

    return commands.check(**given)


@deploy.command()
@folder
@click.option("--wait", type=float, default=60.0, help="Seconds for the SuperLink to answer.")
def register(**given: Any) -> None:  # Any: as commands.register declares them
    """Let the nodes of DIR join; its SuperLink's start script does this."""
    from simulations.deploy import commands

    commands.register(**given)


@deploy.command()
@folder
@click.argument("recipe")
@click.option("--method", help="Instead of the recipe's method.")
@settings
@click.option("--rounds", type=int, help="Short for --set rounds=N.")
@out_folder
@resume
@click.option("--wait", type=float, default=60.0, help="Seconds for nodes that are not there.")
@as_json
def run(**given: Any) -> None:  # Any: as commands.run declares them
    """Run RECIPE on the nodes of DIR; results as of `fedlora run`."""
    from simulations.deploy import commands

    commands.run(**given)
