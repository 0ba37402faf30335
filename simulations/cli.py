"""The ``fedlora`` command: its options, and how each error becomes one line.

What a command does is in ``simulations.commands``, which is loaded when one is called, so that
``fedlora --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fedlora.errors import FedloraError
from simulations import cli_cluster, cli_deploy, cli_node, cli_privacy
from simulations.cli_options import (
    Commands,
    as_json,
    launching,
    out_folder,
    profile,
    resume,
    separated,
    settings,
    whole,
)
from simulations.progress import Stopped
from simulations.stopping import hearing

MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a user's mistake.

    Ctrl-C and SIGTERM end it with 130 and 143.
    """
    with hearing() as heard:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        except Stopped as stop:
            _stopped(stop.folder)
        except (click.Abort, KeyboardInterrupt):
            _stopped(None)
        if argv is None:
            heard.end()
        return heard.code


def _main(arguments: list[str]) -> int:
    """As ``main``, but for signals."""
    from simulations.doctor import house_check

    try:
        if arguments[:1] != ["doctor"]:  # it reports this itself, among the rest
            house_check()
        result = fedlora.main(arguments, prog_name="fedlora", standalone_mode=False)
    except FedloraError as error:
        return _mistake(str(error))
    except click.ClickException as error:
        return _mistake(error.format_message())
    return result if isinstance(result, int) else 0


def _mistake(message: str) -> int:
    """Say what is wrong in one line on stderr."""
    click.echo(f"fedlora: {' '.join(message.split())}", err=True)
    return MISTAKE


def _stopped(folder: Path | None) -> None:
    """Say where the results lie that there are."""
    where = f"; what was finished lies in {folder}" if folder else ""
    click.echo(f"fedlora: stopped{where}", err=True)


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def fedlora(context: click.Context) -> None:
    """Federated LoRA fine-tuning: run methods, compare them, read the results."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@fedlora.command()
@click.argument("recipe", required=False)
@click.option("--method", help="Instead of the recipe's method.")
@click.option("--seed", type=int, help="Short for --set seed=N.")
@launching
@profile
@click.option("--dry-run", is_flag=True, help="Say what it would take, run nothing.")
@resume
def run(**given: Any) -> None:  # Any: as commands.run declares them
    """Run RECIPE, a built-in name or a TOML file; or go on with a run."""
    from simulations import commands

    commands.run(**given)


@fedlora.command()
@click.argument("recipe")
@click.option("--methods", callback=separated, metavar="A,B", help="The recipe's own; or: all.")
@click.option("--seeds", callback=whole, metavar="0,1,2", help="The recipe's own.")
@launching
@profile
@resume
def compare(**given: Any) -> None:  # Any: as commands.compare declares them
    """Run RECIPE with several methods and seeds."""
    from simulations import commands

    commands.compare(**given)


@fedlora.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--shard", "part", metavar="K/N", help="Only each N-th cell, from the K-th on.")
@launching
@click.option("--dry-run", is_flag=True, help="List the cells, run none.")
def sweep(**given: Any) -> int:  # Any: as sweep_commands.sweep declares them
    """Run a grid of changes to a recipe, described in FILE; again to go on with it.

    Exit code 1 if a cell failed; the others are run all the same.
    """
    from simulations import sweep_commands

    return sweep_commands.sweep(**given)


@fedlora.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Show it as it is now, and end.")
@as_json
def watch(**given: Any) -> None:  # Any: as watching.watch declares them
    """Watch the run, or the runs, in FOLDER until they are finished."""
    from simulations import watching

    watching.watch(**given)


@fedlora.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", callback=separated, metavar="A,B", help="Rows whose names hold A or B.")
@click.option("--backend", help="Where to run: inprocess or ray.")
@click.option("--workers", type=int, help="On how many workers.")
@out_folder
@as_json
def reproduce(**given: Any) -> int:  # Any: as reproducing.reproduce declares them
    """Run again what made the result in FOLDER; exit code 1 if a number is another one now."""
    from simulations import reproducing

    return reproducing.reproduce(**given)


@fedlora.command("list")
@click.argument("kind", metavar="methods|tasks|models|adapters|recipes")
@click.option("--partition", metavar="RECIPE", help="With tasks: how RECIPE deals its data.")
@click.option("--figure", type=click.Path(path_type=Path), help="With --partition: draw it.")
@click.option("--table", is_flag=True, help="With methods: what each is and sends, as Markdown.")
@settings
@as_json
def list_names(**given: Any) -> None:  # Any: as listing.list_names declares them
    """List what there is of one kind, one line each."""
    from simulations import listing

    listing.list_names(**given)


@fedlora.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", is_flag=True, help="Also one page, report.html, and curves.svg.")
@out_folder
@as_json
def report(**given: Any) -> None:  # Any: as commands.report declares them
    """Tabulate the runs in FOLDERS.

    Writes table.md, table.csv and curves.png to --out, or into the folder itself when only
    one is given. With --out also runs.jsonl, of which the same can be made again.
    """
    from simulations import commands

    commands.report(**given)


@fedlora.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Fetch all there is.")
def fetch(**given: Any) -> None:  # Any: as commands.fetch declares them
    """Get the data set or the weights called NAME."""
    from simulations import commands

    commands.fetch(**given)


@fedlora.command()
@click.option("--ray", is_flag=True, help="Start Ray as well; takes seconds.")
@as_json
def doctor(**given: Any) -> int:  # Any: as commands.doctor declares them
    """Check this installation; exit code 1 if it is broken."""
    from simulations import commands

    return commands.doctor(**given)


@fedlora.command()
@click.argument("name")
@click.option("--pairs", type=click.IntRange(min=1), help="How often; 5 by default.")
@click.option("--quick", is_flag=True, help="Few lines, and 2 pairs unless --pairs says more.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="For gpu: cpu runs toys.")
@out_folder
@as_json
def bench(**given: Any) -> None:  # Any: as bench.bench declares them
    """Measure NAME (cohort, packs, privacy, gpu) beside its peer, turn by turn.

    Writes table.md, table.csv, ratios.png and environment.json to --out.
    """
    from simulations import bench

    bench.bench(**given)


@fedlora.command()
@click.option("--only", callback=separated, metavar="A,B", help="Of kills, disk, soak, ...")
@click.option("--quick", is_flag=True, help="Few of each, in seconds.")
@out_folder
@as_json
def chaos(**given: Any) -> int:  # Any: as chaos.chaos declares them
    """Put faults into runs and count which were survived; exit code 1 if not all.

    Hostile uploads to every rule, damaged payloads, killed workers, delays, stragglers. Writes
    table.md, faults.json and environment.json to --out.
    """
    from simulations import chaos

    return chaos.chaos(**given)


@fedlora.command()
def version() -> None:
    """Print the version."""
    from simulations import commands

    commands.version()


fedlora.add_command(cli_deploy.deploy)
fedlora.add_command(cli_privacy.privacy)
fedlora.add_command(cli_cluster.cluster)
fedlora.add_command(cli_node.node)


if __name__ == "__main__":
    sys.exit(main())
