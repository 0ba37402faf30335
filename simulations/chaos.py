"""``fedlora chaos``: put faults into runs, and count which were survived."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, choose
from simulations.chaos_disk import disk
from simulations.chaos_faults import QUICK, Fault, Size
from simulations.chaos_fuzz import payloads
from simulations.chaos_kills import kills, signals
from simulations.chaos_soak import soak
from simulations.chaos_uploads import uploads
from simulations.chaos_workers import killed_workers, order, stragglers
from simulations.results import environment

HEADINGS = ("fault", "injected", "survived", "seen")
CHAOS: dict[str, tuple[str, Callable[[Size], list[Fault]]]] = {  # forks come before Ray
    "kills": ("Does a run that is killed and gone on with end the same?", kills),
    "signals": ("Does a run end in time when it is asked to, and go on the same?", signals),
    "disk": ("What is lost when a disk is full, or may only be read?", disk),
    "uploads": ("Does any rule take a hostile upload, or end of it?", uploads),
    "fuzz": ("Does a damaged payload crash the decoder?", payloads),
    "workers": ("What does it cost that a worker dies?", killed_workers),
    "order": ("Do workers, delays or first tries that fail change a result?", order),
    "stragglers": ("Does a round end at its deadline?", stragglers),
    "soak": ("Does anything hang or grow, if faults never stop?", soak),
}


def chaos(only: Sequence[str], quick: bool, out: Path | None, as_json: bool) -> int:
    """Print the table, and write it into ``out`` if there is one; 1 if a fault was not survived.

    Raises:
        ConfigError: there is no such chaos, or ``out`` cannot be written.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    chosen = {name: choose(CHAOS, name, "--only") for name in only or CHAOS}
    found: list[Fault] = []
    written: list[Path] = []
    for name, (question, inject) in chosen.items():
        click.echo(f"{name}: {question}", err=True)
        found += inject(QUICK if quick else Size())
        written = write(found, out) if out else []  # now, lest the next kind end the process
    if as_json:
        faults = [{**asdict(fault), "held": fault.held} for fault in found]
        paths = [str(path) for path in written]
        click.echo(json.dumps({"faults": faults, "written": paths}, indent=2))
    else:
        print_table(found, Console())
        for path in written:
            click.echo(path)
    return int(not all(fault.held for fault in found))


def print_table(found: Sequence[Fault], console: Console) -> None:
    """Print a line for each kind of fault."""
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[1:3] else "left")
    for fault in found:
        table.add_row(*cells(fault))
    console.print(table, markup=False, highlight=False)


def cells(fault: Fault) -> list[str]:
    """One line as people read it."""
    survived = f"{fault.survived}{'' if fault.held else ' (not all)'}"
    return [fault.name, str(fault.injected), survived, fault.seen]


def markdown(found: Sequence[Fault]) -> str:
    """The same as a Markdown table."""
    rows = [list(HEADINGS), ["---", "---:", "---:", "---"], *map(cells, found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(found: Sequence[Fault], folder: Path) -> list[Path]:
    """Write ``table.md``, ``faults.json`` and ``environment.json``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    texts = {
        "table.md": markdown(found),
        "faults.json": json.dumps([asdict(fault) for fault in found], indent=2) + "\n",
        "environment.json": json.dumps(environment(1), indent=2) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {str(folder)!r} ({error.strerror})") from None
    return [folder / name for name in texts]
