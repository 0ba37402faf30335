"""Rows side by side: each seed's numbers, which rows may be compared, and which is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulations.report import IGNORED, Row, flattened, grouped, rows
from simulations.report_page.paired import Verdict, verdict
from simulations.run_folders import Run
from simulations.tables import Column, columns

GIVEN = ("task", "clients", "model", "privacy.unit", "privacy.epsilon", "privacy.delta")
GIVEN_TOO = ("privacy.noise_multiplier",)
FIRST = ("mean", "worst", "perplexity", "loss")  # columns that come before the others


@dataclass(frozen=True)
class Comparison:
    """All that the page says of rows.

    Attributes:
        runs: of each row, by its name, sorted by seed.
        rows: their numbers, in the same order.
        names: what the page calls them: a row's name with its settings' last words, or the name
            itself where these do not tell the rows apart.
        rules: each row's method.
        conditions: what each row was given, in words; the same words mean the same conditions,
            and only such rows are compared. Empty where all rows have the same.
        columns: of the table.
        values: of each column by its key, each row's numbers by seed.
        verdicts: of each score's key, one for each of the conditions that have any; its places
            are those of all rows.
    """

    runs: dict[str, list[Run]]
    rows: list[Row]
    names: list[str]
    rules: list[str]
    conditions: list[str]
    columns: list[Column]
    values: dict[str, list[dict[int, float]]]
    verdicts: dict[str, list[Verdict]]


def compared(runs: Sequence[Run]) -> Comparison:
    """The runs side by side.

    Raises:
        ConfigError: two runs differ in nothing, so they are no two samples.
    """
    members = grouped(runs)
    found = rows(runs)
    shown = sorted(columns(found), key=lambda column: _place(column.key))
    singles = [[(run.seed, rows([run])[0]) for run in several] for several in members.values()]
    values = {column.key: [_by_seed(column, several) for several in singles] for column in shown}
    conditions = _conditions([several[0].config for several in members.values()])
    language = all(row.perplexity is not None for row in found)
    return Comparison(
        runs=members,
        rows=found,
        names=_short([row.method for row in found]),
        rules=[str(several[0].config.get("method", "?")) for several in members.values()],
        conditions=conditions,
        columns=shown,
        values=values,
        verdicts={
            column.key: _verdicts(values[column.key], conditions, greatest)
            for column in shown
            if (greatest := more_is_better(column.key, language)) is not None
        },
    )


def more_is_better(key: str, language: bool = False) -> bool | None:
    """Of a column that says how good a row is; None of costs, spreads and other measurements."""
    if key in ("loss", "perplexity") or key.startswith("perplexity:"):
        return False
    if key in ("mean", "worst") or key.startswith("accuracy:"):
        return True
    if key.startswith("own rows") and not key.endswith("spread"):
        return not language
    return None


def _short(names: list[str]) -> list[str]:
    """``fedavg (train.learning_rate=1)`` as ``fedavg, learning_rate=1``."""
    short = [_last_words(name.removesuffix(")").replace(" (", ", ", 1)) for name in names]
    return short if len(set(short)) == len(names) else names


def _last_words(settings: str) -> str:
    """Settings with the last words of their dotted keys."""
    return re.sub(r"(?<![\w.])[\w.]+\.(\w+)(?= ?=)", r"\1", settings)


def _place(key: str) -> int:
    """Where a column stands: those of ``FIRST``, groups and the rest as they came."""
    return FIRST.index(key) if key in FIRST else len(FIRST)


def _by_seed(column: Column, runs: Sequence[tuple[int, Row]]) -> dict[int, float]:
    """One column's finite numbers of one row, by seed."""
    found = {seed: column.read(row) for seed, row in runs}
    return {seed: stat.mean for seed, stat in found.items() if stat and math.isfinite(stat.mean)}


def _verdicts(
    values: Sequence[Mapping[int, float]], conditions: Sequence[str], greatest: bool
) -> list[Verdict]:
    """The best row under each of the conditions."""
    found = []
    for condition in dict.fromkeys(conditions):
        alike = [values[p] if conditions[p] == condition else {} for p in range(len(values))]
        if one := verdict(alike, greatest):
            found.append(one)
    return found


def _conditions(configs: Sequence[dict[str, Any]]) -> list[str]:  # Any: TOML values
    """What each row was given that others were not: data, clients, model, the promise."""
    given = [_given(config) for config in configs]
    keys = list(dict.fromkeys(key for one in given for key in one))
    differing = [key for key in keys if len({str(one.get(key)) for one in given}) > 1]
    if not differing:
        return [""] * len(given)
    words = [
        ", ".join(f"{key} = {_word(one[key])}" for key in differing if key in one) or "the rest"
        for one in given
    ]
    short = [_last_words(one) for one in words]
    return short if len(set(short)) == len(set(words)) else words


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that no method may choose; without privacy, no epsilon's."""
    settings = {key: value for key, value in config.items() if key not in IGNORED}
    if settings.get("privacy", {}).get("unit", "none") == "none":
        settings["privacy"] = {"epsilon": "none"}
    return {
        key: value
        for key, value in flattened(settings).items()
        if key.partition(".")[0] in GIVEN or key in (*GIVEN, *GIVEN_TOO)
    }


def _word(value: Any) -> str:
    """A value of a configuration as a reader writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
