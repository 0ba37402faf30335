"""What each command of ``fedlora`` does: results to stdout, progress and hints to stderr."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from fedlora.errors import ConfigError, choose, wrong
from simulations.progress import Progress, Stopped, for_terminal

if TYPE_CHECKING:
    from fedlora.config import RunConfig


def run(
    recipe: str | None,
    method: str | None,
    seed: int | None,
    out: Path | None,
    as_json: bool,
    profile: bool,
    dry_run: bool,
    resume: Path | None,
    **launching: Any,  # Any: see overrides
) -> None:
    """One run: its row, and the folder it lies in; or what it would take."""
    if dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before its library is there: it downloads nothing
    from simulations import launch, resuming
    from simulations.recipe import load
    from simulations.run_folders import read_run

    changes = overrides(seed=seed, **launching)
    if resume is not None:
        _alone("--resume", {"--out": out, "--profile": profile, "--dry-run": dry_run})
        config, out = resuming.config_of(resume, recipe, method, changes), resume
        if resuming.finished(resume):
            click.echo(f"fedlora: {resume}: finished already", err=True)
            return show([read_run(resume)], {"folder": str(resume)}, as_json)
    elif recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'.")
    else:
        config = load(recipe).resolve(method, changes)
    if dry_run:
        return _show_dry_run(config, as_json)
    with watched() as progress:
        folder = launch.run(config, out, progress, profile, resume is not None)
    show([read_run(folder)], {"folder": str(folder)}, as_json, profile)


def compare(
    recipe: str,
    methods: list[str],
    seeds: list[int],
    out: Path | None,
    as_json: bool,
    profile: bool,
    resume: Path | None,
    **launching: Any,  # Any: see overrides
) -> None:
    """Several methods and seeds: a row for each method, and where the report lies.

    Of ``all`` methods, those that the recipe cannot run are left out and named.
    """
    from simulations import launch
    from simulations.recipe import load
    from simulations.run_folders import collect
    from simulations.suited_rules import suited_rules
    from simulations.tables import write
    from strategies import METHODS

    plan, left_out = load(recipe), dict[str, str]()
    changes = overrides(**launching)
    if methods == ["all"]:
        methods, left_out = suited_rules(plan, changes)
        for name, reason in left_out.items():
            click.echo(f"fedlora: left out {name}: {reason}", err=True)
    methods = methods or list(plan.compare)
    for method in methods:
        choose(METHODS, method, "compare: methods")
    seeds = seeds or [plan.resolve(None, changes).seed]
    if resume is not None:
        _alone("--resume", {"--out": out, "--profile": profile})
    again = resume is not None
    with watched(many=True) as progress:
        folder = launch.compare(
            plan, methods, seeds, changes, resume or out, progress, profile, again
        )
    finished = collect([folder])
    written = write(finished, folder)
    where = {"folder": str(folder), "written": [str(path) for path in written]}
    show(finished, {**where, "left_out": left_out}, as_json, profile)


def report(folders: Sequence[Path], html: bool, out: Path | None, as_json: bool) -> None:
    """The rows of finished runs, written beside them or into ``out``; ``html`` as a page too."""
    from simulations.run_folders import KEPT, collect, keep
    from simulations.tables import write

    target = folders[0] if out is None and len(folders) == 1 else out
    if html and not target:
        raise ConfigError("--html: found several folders, allowed: one, or --out beside them")
    finished = collect(folders)
    written = [str(path) for path in write(finished, target)] if target else []
    if html and target:
        from simulations.report_page.page import write_page

        written += [str(path) for path in write_page(finished, target)]
    if out:
        written.append(str(keep(finished, out / KEPT)))
    if not target:
        click.echo("fedlora: nothing written; name a folder with --out for that", err=True)
    show(finished, {"written": written}, as_json)


def fetch(name: str | None, everything: bool) -> None:
    """Get one source, or all; with all, one that fails does not stop the others."""
    from fedlora.fetch import SOURCES
    from fedlora.fetch import fetch as get

    if (name is None) == (not everything):
        raise ConfigError(f"fetch: name one of {', '.join(SOURCES)}, or give --all")
    failed = []
    for source in SOURCES if name is None else [name]:
        try:
            path = get(source, lambda line: click.echo(line, err=True))
            click.echo(f"{source}: {path}")
        except ConfigError as error:
            failed.append(str(error))
    if failed:
        raise ConfigError("; ".join(failed))


def doctor(ray: bool, as_json: bool) -> int:
    """Print the checks; 1 if one of them failed."""
    from simulations.doctor import checks

    found = checks(ray)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=2))
    else:
        for check in found:
            click.echo(f"{check.state:<4}  {check.name}: {check.detail}")
    return int(any(check.state == "fail" for check in found))


def version() -> None:
    """Print the installed version."""
    try:
        click.echo(importlib.metadata.version("fedlora"))
    except importlib.metadata.PackageNotFoundError:
        click.echo("not installed, running from a checkout")


def overrides(
    settings: Sequence[str],
    rounds: int | None,
    backend: str | None,
    workers: int | None,
    address: str | None = None,
    seed: int | None = None,
    track: Sequence[str] = (),
) -> list[str]:
    """``--set`` and its short forms as one list; the short forms come last and win.

    Raises:
        ConfigError: an address, and a backend that has none.
    """
    if address is not None:
        if backend not in (None, "ray"):
            raise wrong("--address", address, f"with --backend ray, not {backend}")
        backend = "ray"
    short = {
        "rounds": rounds,
        "seed": seed,
        "launch.backend": None if backend is None else json.dumps(backend),
        "launch.workers": workers,
        "launch.address": None if address is None else json.dumps(address),
        "launch.track": json.dumps([*track]) if track else None,
    }
    return [*settings, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _alone(option: str, others: Mapping[str, object]) -> None:
    """Refuse what does not go with an option."""
    for name, value in others.items():
        if value:
            raise ConfigError(f"{option}: found {name} beside it, allowed: not both")


def _show_dry_run(config: RunConfig, as_json: bool) -> None:
    """Print what the run would take; ``out`` and ``profile`` do not matter then."""
    from simulations.dry_run import dry_run
    from simulations.dry_run_table import table

    found = dry_run(config)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        Console().print(table(found), markup=False, highlight=False)


@contextmanager
def watched(many: bool = False) -> Iterator[Progress]:
    """Show progress; on Ctrl-C, leave the terminal as it was and say where results lie.

    With ``many`` runs, that is the folder of their folders.
    """
    with for_terminal() as progress:
        try:
            yield progress
        except KeyboardInterrupt:
            folder = progress.folder.parent if progress.folder and many else progress.folder
            raise Stopped(folder) from None


def show(
    runs: Sequence[Any],  # Any: Run, as where is JSON
    where: Mapping[str, Any],
    as_json: bool,
    profile: bool = False,
) -> None:
    """Print rows, with ``profile`` where the time of each run went, and where things lie."""
    from simulations import tables
    from simulations.profiling import print_profile, read_profile
    from simulations.report import rows

    found = rows(runs)
    profiles = {run.folder.name: read_profile(run.folder) for run in runs} if profile else {}
    if as_json:
        shown = {**where, "rows": tables.as_json(found)}
        return click.echo(
            json.dumps({**shown, **({"profiles": profiles} if profile else {})}, indent=2)
        )
    tables.print_table(found, Console())
    for name, one in profiles.items():
        print_profile(name, one, Console())
    for line in where.get("written") or [where[key] for key in ("folder",) if key in where]:
        click.echo(line)
