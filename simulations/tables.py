"""Rows of numbers as a terminal table, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError
from simulations import rules_figure, settings_figure
from simulations.attacked import attacks
from simulations.figures import curves
from simulations.report import Row, Stat, rows
from simulations.run_folders import Run
from simulations.trade_off import trade_off
from simulations.virtual_time import virtual_time

MORE = {
    "trade_off.png": trade_off,
    "rules.png": rules_figure.rules,
    "settings.png": settings_figure.grid,
    "attacks.md": attacks,
    "virtual_time.png": virtual_time,
}
BLANK = "–"  # noqa: RUF001 (an en dash stands for what was not measured)


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, its key in CSV, and where its number comes from."""

    heading: str
    key: str
    read: Callable[[Row], Stat | None]
    digits: str = ".3f"
    unit: float = 1.0

    def cell(self, row: Row) -> str:
        """The number as people read it: mean, and spread unless it is 0."""
        stat = self.read(row)
        if stat is None:
            return BLANK
        text = format(stat.mean / self.unit, self.digits)
        if not stat.deviation:
            return text
        return f"{text} ± {format(stat.deviation / self.unit, self.digits)}"


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows fill: accuracy by group, for language perplexity."""
    chosen: list[Column] = []
    if any(row.mean is not None for row in rows):
        chosen += [
            *_by_group(rows, False),
            Column("mean", "mean", lambda row: row.mean),
            Column("worst", "worst", lambda row: row.worst),
            Column("mean at round 0", "before", lambda row: None if row.perplexity else row.before),
        ]
    if any(row.perplexity is not None for row in rows):
        chosen += [
            *_by_group(rows, True),
            Column("perplexity", "perplexity", lambda row: row.perplexity),
            Column(
                "perplexity at round 0",
                "perplexity_before",
                lambda row: row.before if row.perplexity else None,
            ),
        ]
    for name in dict.fromkeys(name for row in rows for name in row.own_rows):
        chosen.append(Column(name, name, _own_rows_reader(name)))
    timed = any(row.virtual_seconds is not None for row in rows)
    virtual = Column("virtual seconds", "virtual_seconds", lambda row: row.virtual_seconds, ".1f")
    return [
        *chosen,
        Column("loss", "loss", lambda row: row.loss),
        Column("aggregation error", "aggregation_error", lambda row: row.aggregation_error, ".2g"),
        Column("MB up", "bytes_up", lambda row: row.bytes_up, ".2f", 1e6),
        Column("MB down", "bytes_down", lambda row: row.bytes_down, ".2f", 1e6),
        Column("seconds", "seconds", lambda row: row.seconds, ".1f"),
        *([virtual] if timed else []),
    ]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A heading line, then one line for each row, as text."""
    chosen = columns(rows)
    lines = [["method", "learning rate", "seeds", *(column.heading for column in chosen)]]
    for row in rows:
        rate = BLANK if row.learning_rate is None else f"{row.learning_rate:g}"
        seeds = ", ".join(map(str, row.seeds))
        lines.append([row.method, rate, seeds, *(column.cell(row) for column in chosen)])
    return lines


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the rows, on their side (methods across) where the terminal is too narrow.

    Where it is too narrow for that too, a few methods at a time.
    """
    lines = cells(rows)
    if _width(lines) > console.width:
        lines = [list(line) for line in zip(*lines, strict=True)]
    for part in _fitting(lines, console.width):
        table = Table()
        for place, heading in enumerate(part[0]):
            table.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
        for line in part[1:]:
            table.add_row(*line)
        console.print(table, markup=False, highlight=False)
    for note in notes(rows):
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _width(lines: Sequence[Sequence[str]]) -> int:
    """What a table of these cells takes of a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return sum(widths) + 3 * len(widths) + 1


def _fitting(lines: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """The first column with as many of the others as fit, until there are no more."""
    while len(lines[0]) > 1:
        fits = len(lines[0])
        while fits > 2 and _width([line[:fits] for line in lines]) > width:
            fits -= 1
        yield [line[:fits] for line in lines]
        lines = [[line[0], *line[fits:]] for line in lines]


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes of all rows, and what a spread means where one is shown."""
    found = [note for row in rows for note in row.notes]
    if any(len(row.seeds) > 1 for row in rows):
        found.append("± is the standard deviation over the seeds (n - 1).")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line for each row, with the notes under it."""
    heading, *lines = cells(rows)
    table = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in table)
    return "\n".join([text, *(f"\n{note}" for note in notes(rows))]) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """CSV with unrounded numbers and bytes; ``_sd`` columns hold the spread over seeds."""
    chosen = columns(rows)
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    names = [name for column in chosen for name in (column.key, f"{column.key}_sd")]
    writer.writerow(["method", "learning_rate", "seeds", *names])
    for row in rows:
        stats = [column.read(row) for column in chosen]
        pairs = [(stat.mean, stat.deviation) if stat else (None, None) for stat in stats]
        numbers = [number for pair in pairs for number in pair]
        writer.writerow([row.method, row.learning_rate, " ".join(map(str, row.seeds)), *numbers])
    return target.getvalue()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:  # Any: JSON values of several kinds
    """The rows as plain JSON; numbers that are not finite become words such as ``inf``."""
    return [{key: _plain(value) for key, value in asdict(row).items()} for row in rows]


def write(runs: Sequence[Run], folder: Path) -> tuple[Path, ...]:
    """Write ``table.md``, ``table.csv`` and ``curves.png`` into a folder; return their paths.

    Runs that differ in epsilon alone get ``trade_off.png`` as well, in other settings
    ``settings.png``, many rules ``rules.png``, runs that differ in who attacks ``attacks.md``, and
    runs on a virtual clock ``virtual_time.png``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    found = rows(runs)
    paths = [folder / name for name in ("table.md", "table.csv", "curves.png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(markdown(found), encoding="utf-8")
        paths[1].write_text(comma_separated(found), encoding="utf-8")
        curves(runs, paths[2])
        for name, more in MORE.items():
            if more(runs, folder / name):
                paths.append(folder / name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report ({error.strerror})") from None
    return tuple(paths)


def _by_group(rows: Sequence[Row], language: bool) -> list[Column]:
    """A column for each group of the rows that are of language, or of those that are not."""
    word = "perplexity" if language else "accuracy"
    own = [row for row in rows if (row.perplexity is not None) == language]
    names = dict.fromkeys(group for row in own for group in row.groups)
    return [Column(name, f"{word}:{name}", _group_reader(name, language)) for name in names]


def _group_reader(group: str, language: bool) -> Callable[[Row], Stat | None]:
    """Reads one group's accuracy or perplexity."""
    return lambda row: row.groups.get(group) if (row.perplexity is not None) == language else None


def _own_rows_reader(name: str) -> Callable[[Row], Stat | None]:
    """Reads one number over the clients' own rows."""
    return lambda row: row.own_rows.get(name)


def _plain(value: Any) -> Any:  # Any: JSON in, JSON out
    """The value with no number in it that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
