"""``fedlora watch``: a run, or a folder of runs, as it comes; read from its files alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedlora.errors import ConfigError
from simulations.progress import minutes
from simulations.recipe import Recipe
from simulations.run_folders import Run, is_run, read_run
from simulations.spending import spent
from simulations.tables import BLANK

EVERY = 1.0  # seconds between looks
RECENT = 5  # rounds whose mean tells how long the others will take


@dataclass(frozen=True)
class Seen:
    """How far a run is.

    Attributes:
        name: of its folder.
        rounds, planned: done, and in all.
        finished: whether its summary is written.
        score, loss, aggregation_error: of the last round; the score is the mean accuracy over
            groups, of language models the perplexity.
        failures: replies that did not count, in all rounds.
        where: the backend, with its workers.
        spent, target: epsilon by the ledger, of whoever spent most, and what it must not pass; by
            Rényi's bound, which is quick and never too low. None where nothing is private.
        left: seconds to the end, as the last rounds went.
        quiet: seconds since anything was written.
    """

    name: str
    rounds: int
    planned: int
    finished: bool
    score: float | None
    loss: float | None
    aggregation_error: float | None
    failures: int
    where: str
    spent: float | None
    target: float | None
    left: float | None
    quiet: float


def watch(folder: Path, once: bool, as_json: bool) -> None:
    """Show a folder until all its runs are finished, or ``once``.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"watch: found no folder {str(folder)!r}")
    if as_json:
        return click.echo(json.dumps({"runs": [asdict(seen) for seen in look(folder)]}, indent=2))
    console = Console()
    if once or not sys.stdout.isatty():
        return console.print(shown(look(folder)))
    with Live(shown(look(folder)), console=console, auto_refresh=False) as live:
        while not (found := look(folder)) or not all(seen.finished for seen in found):
            live.update(shown(found), refresh=True)
            time.sleep(EVERY)
        live.update(shown(found), refresh=True)


def look(folder: Path) -> list[Seen]:
    """The runs in a folder, or the one that it is, by name, that have measured something."""
    places = [folder] if is_run(folder) else sorted(filter(is_run, folder.iterdir()))
    found = []
    for place in places:
        try:
            found.append(_seen(read_run(place)))
        except ConfigError:  # half of a line is written
            continue
    return found


def shown(runs: Sequence[Seen]) -> Group:
    """A line for each run, and where there are several one for all."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "rounds", "", "score", "loss", "error", "failed", "epsilon", "left"):
        table.add_column(heading, justify="left" if heading in ("run", "") else "right")
    for seen in runs:
        bar = ProgressBar(seen.planned, seen.rounds, width=20)
        table.add_row(
            Text(seen.name),
            f"{seen.rounds}/{seen.planned}",
            bar,
            _number(seen.score, "0.3f"),
            _number(seen.loss, "0.3f"),
            _number(seen.aggregation_error, "0.2g"),
            str(seen.failures),
            _epsilon(seen),
            _state(seen),
        )
    done = sum(seen.finished for seen in runs)
    where = ", ".join(sorted({seen.where for seen in runs})) or "nothing yet"
    return Group(table, Text(f"{done} of {len(runs)} runs finished; {where}", style="dim"))


def _seen(run: Run) -> Seen:
    """One run."""
    table = {**run.config}
    config = Recipe(str(table.pop("name", "run")), "", table).resolve()
    last, done = run.last, int(run.last["round"])
    recent = [float(record["seconds"]) for record in run.rounds[1:]][-RECENT:]
    finished = bool(run.summary)
    each = sum(recent) / len(recent) if recent else None
    workers = config.launch.workers or "all"
    return Seen(
        name=run.folder.name,
        rounds=done,
        planned=config.rounds,
        finished=finished,
        score=_latest(run, "perplexity") or _latest(run, "mean"),
        loss=_latest(run, "loss"),
        aggregation_error=last.get("aggregation_error"),
        failures=sum(len(record.get("failures", [])) for record in run.rounds),
        where="in one process"
        if config.launch.backend == "inprocess"
        else f"Ray, {workers} workers",
        spent=spent(config, run.folder),
        target=config.privacy.epsilon,
        left=None if finished or each is None else each * (config.rounds - done),
        quiet=max(0.0, time.time() - (run.folder / "rounds.jsonl").stat().st_mtime),
    )


def _latest(run: Run, name: str) -> float | None:
    """A number of the last round that has it."""
    return next((value for value in reversed(run.values(name)) if value is not None), None)


def _number(value: float | None, form: str) -> str:
    """A number, or that there is none."""
    return BLANK if value is None else f"{value:{form}}"


def _epsilon(seen: Seen) -> str:
    """What was spent, of what."""
    if seen.spent is None:
        return ""
    return f"{seen.spent:.2f}" + (f" of {seen.target:g}" if seen.target else "")


def _state(seen: Seen) -> str:
    """How long it will take, or that it is done, or for how long nothing came."""
    if seen.finished:
        return "finished"
    left = minutes(seen.left) if seen.left is not None else BLANK
    return left if seen.quiet < 60 else f"{left}, quiet for {minutes(seen.quiet)}"
