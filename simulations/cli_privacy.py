"""The commands ``fedlora privacy ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simulations.cli_options import Commands, as_json, settings


@click.group(cls=Commands)
def privacy() -> None:
    """Plan differential privacy, say what a private run promises, or try to break it."""


@privacy.command()
@click.argument("recipe")
@click.option("--method", help="Instead of the recipe's method.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw epsilon over the rounds.")
@settings
@as_json
def plan(**given: Any) -> None:  # Any: as privacy_commands.plan declares them
    """Show each client's noise and what all rounds of RECIPE would cost it."""
    from simulations import privacy_commands

    privacy_commands.plan(**given)


@privacy.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--figure", type=click.Path(path_type=Path), help="Instead of FOLDER/privacy.png.")
@as_json
def privacy_report(**given: Any) -> None:  # Any: as privacy_commands.report declares them
    """State in words what the private run in FOLDER promises and what it spent."""
    from simulations import privacy_commands

    privacy_commands.report(**given)


@privacy.command()
@click.argument("recipe")
@click.option("--method", help="Instead of the recipe's method.")
@click.option("--seed", type=int, help="Short for --set seed=N.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw canaries and noise.")
@settings
@as_json
def audit(**given: Any) -> int:  # Any: as privacy_commands.audit declares them
    """Try to break the promise of RECIPE on the code that keeps it; exit code 1 if broken."""
    from simulations import privacy_commands

    return privacy_commands.audit(**given)
