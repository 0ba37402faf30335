"""What the commands of ``fedlora`` share: options, and groups that know their commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fedlora.errors import unknown, wrong

F = TypeVar("F", bound=Callable[..., Any])  # Any: a command takes whatever its options give


class Commands(click.Group):
    """A group that names the nearest command for one it does not know."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Look the command up, or say which one may have been meant."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def separated(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """A comma-separated option as a list; each entry once."""
    entries = [entry.strip() for entry in value.split(",")] if value is not None else []
    if len(set(entries)) < len(entries) or "" in entries:
        raise wrong(f"--{parameter.name}", value, "names separated by commas, each once")
    return entries


def whole(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    """A comma-separated option as a list of whole numbers from 0."""
    entries = separated(context, parameter, value)
    if not all(entry.isascii() and entry.isdigit() for entry in entries):
        raise wrong(f"--{parameter.name}", value, "whole numbers from 0, separated by commas")
    numbers = sorted({int(entry) for entry in entries})
    if len(numbers) < len(entries):
        raise wrong(f"--{parameter.name}", value, "each number once")
    return numbers


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which help lists them."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
settings = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe."
)
profile = click.option("--profile", is_flag=True, help="Take the time of each part of the rounds.")
resume = click.option(
    "--resume", type=click.Path(path_type=Path), metavar="FOLDER", help="Go on with what it holds."
)
out_folder = click.option("--out", type=click.Path(path_type=Path), help="Folder for the results.")
launching = options(
    settings,
    click.option("--rounds", type=int, help="Short for --set rounds=N."),
    click.option("--backend", help="Short for --set launch.backend=NAME (inprocess or ray)."),
    click.option("--workers", type=int, help="Short for --set launch.workers=N."),
    click.option("--address", help="Join the Ray cluster at HOST:PORT, or auto; sets the backend."),
    click.option(
        "--track", callback=separated, metavar="A,B", help="Of tensorboard, wandb, mlflow."
    ),
    out_folder,
    as_json,
)
