"""Tables from files: CSV, JSON lines and parquet, row by row, each row with its place."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.errors import DataError

Cells = Mapping[str, Any]  # Any: what a cell holds is looked at by ``text_of``
SHOWN = 40  # characters of a cell that an error shows


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """For each row its place in the file (``line 3``), and these columns' cells as text.

    Raises:
        DataError: a file that cannot be read or is of no known kind, a column that is missing,
            or a row that does not parse or has an empty cell there.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: found {path.suffix!r}, allowed: {', '.join(READERS)}")
    rows = []
    with _readable(path):
        for place, cells in read(path):
            if missing := [name for name in columns if name not in cells]:
                found = ", ".join(map(str, cells))
                raise DataError(
                    f"{path}, {place}: found column(s) {found}, allowed: with {missing[0]!r}", place
                )
            rows.append((place, [text_of(cells[name], name, path, place) for name in columns]))
    if not rows:
        raise DataError(f"{path}: found no rows, allowed: one or more")
    return rows


def text_of(cell: object, column: str, path: Path, place: str) -> str:
    """A cell as text: whole numbers without a point, others as Python writes them.

    Raises:
        DataError: it is empty or a structure.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, str | int | float) and cell == cell and str(cell).strip():
        return str(cell)
    kind = "nothing" if cell is None or cell == "" or cell != cell else type(cell).__name__
    kind = "white space alone" if isinstance(cell, str) and cell else kind
    raise DataError(
        f"{path}, {place}, column {column!r}: found {kind}, allowed: text or a number", place
    )


def shown(cell: str) -> str:
    """A cell as an error shows it."""
    return repr(cell if len(cell) <= SHOWN else f"{cell[:SHOWN]}...")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file's reader says is wrong with it, in one line."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: found no such file") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}"
        raise DataError(f"{path}: found {found} at {error.start}, allowed: UTF-8") from None
    except OSError as error:
        reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Cells]]:
    """Rows under a header; quoted cells may hold line ends, and the place is a row's last line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                place = f"line {reader.line_num}"
                raise DataError(f"{path}, {place}: not valid CSV: {error}", place) from None
            if row is None:
                return
            place = f"line {reader.line_num}"
            if header is None:
                header = row
                if twice := sorted({name for name in row if row.count(name) > 1}):
                    raise DataError(f"{path}, {place}: found column {twice[0]!r} twice", place)
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, {place}: found {len(row)} cells, allowed: {len(header)}, as in "
                        "the header",
                        place,
                    )
                yield place, dict(zip(header, row, strict=True))


def _tsv(path: Path) -> Iterator[tuple[str, Cells]]:
    """As CSV, by tabs."""
    return _csv(path, "\t")


def _jsonl(path: Path) -> Iterator[tuple[str, Cells]]:
    """An object on each line; empty lines are passed over."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise DataError(
                    f"{path}, {place}: found no JSON object, allowed: one a line", place
                )
            yield place, found


def _parquet(path: Path) -> Iterator[tuple[str, Cells]]:
    """The rows of all columns, counted from 1."""
    from pyarrow import ArrowException, parquet

    with path.open("rb") as file:
        try:
            table = parquet.read_table(file)
        except (ArrowException, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{path}: not a whole parquet file: {reason}") from None
        rows = table.to_pylist()
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Cells]]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of a long text; 131,072 characters otherwise
