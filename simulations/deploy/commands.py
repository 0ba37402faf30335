"""What the commands of ``fedlora deploy`` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from fedlora.errors import ConfigError, wrong
from simulations.deploy.layout import find
from simulations.doctor import Check

LONGEST = 86400  # seconds to wait for anything


def init(
    folder: Path,
    nodes: int,
    hosts: Sequence[str],
    port: int,
    days: int,
    trainer: bool,
    data: str,
) -> None:
    """Write a deployment and name what to read first."""
    from simulations.deploy.creating import create, plan

    place = create(folder, plan(nodes, hosts, port, data, trainer), days)
    click.echo(f"{place.folder / 'README.md'}: what to copy where, and what to start")


def check(
    folder: Path,
    node: int | None,
    superlink: bool,
    recipe: str | None,
    settings: Sequence[str],
    wait: float,
    quiet: bool,
    as_json: bool,
) -> int:
    """Print what was looked at, or with ``quiet`` only what is wrong; 1 if something is."""
    from simulations.deploy import checks

    if node is not None and superlink:
        raise ConfigError("--node: found --superlink beside it, allowed: not both")
    if settings and recipe is None:
        raise ConfigError("--set: found no --recipe that it could change")
    _check_wait(wait)
    place = find(folder)
    if node is not None:
        found = checks.check_node(place, node, wait)
    else:
        found = checks.check_superlink(place) if superlink else checks.check_whole(place)
    if recipe is not None:
        from simulations.deploy.needs import check_needs

        found += check_needs(recipe, settings, place, node)
    _show(found, quiet, as_json)
    return int(any(each.state == "fail" for each in found))


def register(folder: Path, wait: float) -> None:
    """Register the nodes' keys that the SuperLink does not know."""
    from simulations.deploy.checks import register as register_keys

    _check_wait(wait)
    place = find(folder)
    new = register_keys(place, wait)
    known = place.deployment.nodes - len(new)
    click.echo(f"registered {len(new)} keys, {known} were known", err=True)


def run(
    folder: Path,
    recipe: str,
    method: str | None,
    settings: Sequence[str],
    rounds: int | None,
    out: Path | None,
    resume: Path | None,
    wait: float,
    as_json: bool,
) -> None:
    """One run on the deployment: its row, and the folder it lies in."""
    from simulations.commands import overrides, show, watched
    from simulations.deploy.submitting import submit
    from simulations.recipe import load
    from simulations.run_folders import read_run

    place = find(folder)
    _check_wait(wait)
    if out and resume and (out / "config.toml").exists():
        raise ConfigError("--resume: found --out with a run in it, allowed: a new folder, or none")
    config = load(recipe).resolve(method, overrides(settings, rounds, None, None))
    with watched() as progress:
        done = submit(place, config, out, progress, wait, resume)
    show([read_run(done)], {"folder": str(done)}, as_json)


def _check_wait(seconds: float) -> None:
    """Refuse to wait for ever, or for less than no time."""
    if not 0 <= seconds <= LONGEST:
        raise wrong("--wait", seconds, f"0 to {LONGEST} seconds")


def _show(found: Sequence[Check], quiet: bool, as_json: bool) -> None:
    """Print checks."""
    if as_json:
        return click.echo(json.dumps([asdict(check) for check in found], indent=2))
    for check in found:
        if not quiet:
            click.echo(f"{check.state:<4}  {check.name}: {check.detail}")
        elif check.state != "ok":
            click.echo(f"fedlora: {check.detail}", err=True)
