"""``fedlora bench``: measure one thing beside its peer, and write down what came out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, choose
from simulations import bench_gpu
from simulations.bench_cohort import CROWDS, SIZES, cohort, packs
from simulations.bench_deploy import deploy
from simulations.bench_figure import ratios
from simulations.bench_flower import flower
from simulations.bench_gpu import gpu
from simulations.bench_overhead import overhead
from simulations.bench_pairs import Row, Tell
from simulations.bench_payload import payload
from simulations.bench_pfl import SUBJECTS as PEERED
from simulations.bench_pfl import pfl
from simulations.bench_privacy import SUBJECTS, privacy
from simulations.bench_scale import scale
from simulations.bench_server import SMALL as SMALL_SERVER
from simulations.bench_server import server
from simulations.results import environment

Bench = Callable[[int, Tell], list[Row]]  # (pairs, tell) -> rows

BENCHES: dict[str, tuple[str, Bench]] = {
    "cohort": ("How many times as fast are packs as one by one?", cohort),
    "packs": ("How many clients make the fastest pack?", packs),
    "overhead": ("What does our engine add to a bare loop of PyTorch?", overhead),
    "privacy": ("What does our private step cost, over a plain one and over bare Opacus?", privacy),
    "flower": ("How long does a round take, ours over Flower's own simulation?", flower),
    "pfl": ("How many times as fast is a round of ours as pfl-research's?", pfl),
    "payload": ("What does it cost to send clients large adapters and get them back?", payload),
    "scale": ("Does a client cost more among ten thousand than among a hundred?", scale),
    "gpu": ("How many times as fast are packs on a GPU, and how near the base's limit?", gpu),
    "server": ("What does each rule's merge cost for a 7B model's adapters?", server),
    "deploy": ("How long does a deployed round take, with a resident trainer and without?", deploy),
}
QUICK: dict[str, Bench] = {  # the lines of --quick, where they are not all
    "cohort": partial(cohort, crowds=CROWDS[:1]),
    "packs": partial(packs, sizes=SIZES[:1]),
    "pfl": partial(pfl, subjects=PEERED[:1]),
    "privacy": partial(privacy, subjects=SUBJECTS[1:], crowds=()),
    "gpu": bench_gpu.quick,
    "server": partial(server, subject=SMALL_SERVER),
    "deploy": partial(deploy, model="tiny"),
}
PAIRS, QUICK_PAIRS = 5, 2
THREADS = 1  # torch threads, as each worker has by default
HEADINGS = ("case", "ours", "peer", "ratio", "allowed")


def bench(
    name: str,
    pairs: int | None,
    quick: bool,
    out: Path | None,
    as_json: bool,
    device: str | None = None,
) -> None:
    """Measure one bench, print its rows, and write them into ``out`` if there is one.

    ``quick`` leaves out most lines and, unless ``pairs`` is given, most pairs. ``device`` is for
    bench ``gpu``, which runs toys on the CPU.

    Raises:
        ConfigError: there is no such bench, it takes no device, or ``out`` cannot be written.
    """
    question, function = choose(BENCHES, name, "bench")
    if device and name != "gpu":
        raise ConfigError(f"--device: found {device!r}, allowed: with bench gpu alone")
    with _one_thread(), _telling() as tell:
        here = environment(THREADS)
        function = QUICK.get(name, function) if quick else function
        function = bench_gpu.toys if device == "cpu" else function
        rows = function(pairs or (QUICK_PAIRS if quick else PAIRS), tell)
    written = write(rows, question, here, out) if out else []
    if as_json:
        entries = [asdict(row) for row in rows]
        paths = [str(path) for path in written]
        document = {"bench": name, "question": question, "threads": THREADS, "rows": entries}
        return click.echo(json.dumps({**document, "written": paths}, indent=2))
    print_table(rows, question, Console())
    for path in written:
        click.echo(path)


def print_table(rows: Sequence[Row], question: str, console: Console) -> None:
    """Print the rows, and in words what was missed."""
    table = Table(title=question, title_justify="left", title_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table, markup=False, highlight=False)
    for note in notes(rows):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def cells(row: Row) -> list[str]:
    """One row as people read it."""
    allowed = "" if row.allowed is None else f"{promised(row)}{' (missed)' if row.missed else ''}"
    times = [f"{time:.3g} {row.unit}" for time in (row.ours, row.peer)]
    return [row.case, *times, row.shown, allowed]


def promised(row: Row) -> str:
    """The limit in words; that a ratio is at most so large goes without saying."""
    return f"{'at least ' if row.sense == 'at least' else ''}{row.allowed:g}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What the numbers are, and each limit that was not kept."""
    clocks = {"wall": "time on the wall", "cpu": "processor time"}
    named = " or ".join(clocks[clock] for clock in dict.fromkeys(row.clock for row in rows))
    turned = ", the peer's time over ours," if rows[0].sense == "at least" else ""
    how = (
        f"Medians of {rows[0].pairs} pairs, turn by turn, in {named}, {THREADS} torch "
        f"thread{'s' * (THREADS > 1)}; the ratio{turned} is the median of the pairs'."
    )
    missed = [row for row in rows if row.missed]
    return [
        how,
        *(f"Missed: {row.case} is {row.ratio:.3f}, allowed: {promised(row)}." for row in missed),
    ]


def write(
    rows: Sequence[Row],
    question: str,
    here: Mapping[str, Any],  # Any: JSON values of several kinds
    folder: Path,
) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``ratios.png`` and ``environment.json``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    names = ("table.md", "table.csv", "ratios.png", "environment.json")
    paths = [folder / name for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(markdown(rows), encoding="utf-8")
        paths[1].write_text(comma_separated(rows), encoding="utf-8")
        ratios(rows, question, paths[2])
        paths[3].write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {str(folder)!r} ({error.strerror})") from None
    return paths


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, and under it what the numbers are."""
    table = [list(HEADINGS), ["---", *["---:"] * (len(HEADINGS) - 1)], *map(cells, rows)]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([*lines, *(f"\n{note}" for note in notes(rows))]) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """CSV with unrounded numbers."""
    target = io.StringIO()
    writer = csv.DictWriter(target, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return target.getvalue()


@contextmanager
def _one_thread() -> Iterator[None]:
    """``THREADS`` torch threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _telling() -> Iterator[Tell]:
    """What is going on, on stderr: one line that changes, or a line for each case."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        said = set[str]()

        def tell(text: str) -> None:
            case = text.rpartition(":")[0]
            if case not in said:
                said.add(case)
                click.echo(case, err=True)

        yield tell
