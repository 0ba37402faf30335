"""Bring finished runs down to one row of numbers for each method."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from simulations.run_folders import Run, pick

IGNORED = ("name", "seed", "launch")  # where configs of one row may differ


@dataclass(frozen=True)
class Stat:
    """A mean over seeds and, with two seeds or more, the sample standard deviation."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Row:
    """One method, over its seeds.

    Attributes:
        method: its name, with the settings that tell it from other rows of that method.
        groups: accuracy per group after the last round, or perplexity for language.
        before: at round 0, the mean accuracy over the groups (perplexity for language).
        mean: unweighted mean of the groups' accuracies; None for language, as ``worst``.
        worst: accuracy of each run's worst group.
        aggregation_error: of the last round.
        own_rows: what clients measured on rows of their own after the last round, by its name in
            the table: accuracy, or loss for language.
        bytes_up, bytes_down, seconds: summed over the rounds of a run.
        virtual_seconds: at the end of the last round; None without a virtual clock.
        notes: what a reader of the numbers must know (unfinished runs, failures).
    """

    method: str
    learning_rate: float | None
    seeds: tuple[int, ...]
    groups: dict[str, Stat]
    before: Stat | None
    mean: Stat | None
    worst: Stat | None
    loss: Stat | None
    perplexity: Stat | None
    aggregation_error: Stat | None
    bytes_up: Stat | None
    bytes_down: Stat | None
    seconds: Stat | None
    notes: tuple[str, ...] = ()
    own_rows: dict[str, Stat] = field(default_factory=dict)
    virtual_seconds: Stat | None = None


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, by the row's name, sorted by seed.

    Runs share a row when their configs differ in nothing but name, seed and launch.

    Raises:
        ConfigError: two runs differ in nothing at all, so they are no two samples.
    """
    rows = alike(runs)
    for members in rows.values():
        for one, other in pairwise(members):
            if one.seed == other.seed:
                raise ConfigError(
                    f"{one.folder} and {other.folder}: the same settings and seed {one.seed} "
                    "twice; leave one of them out"
                )
    return rows


def alike(runs: Sequence[Run], ignored: Sequence[str] = IGNORED) -> dict[str, list[Run]]:
    """The runs whose configs differ in nothing but what is ignored, by name, sorted by seed."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(json.dumps(_settings(run, ignored), sort_keys=True), []).append(run)
    for members in rows.values():
        members.sort(key=lambda run: run.seed)
    names = _names([members[0] for members in rows.values()], ignored)
    return dict(zip(names, rows.values(), strict=True))


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row for each method, or for each of its settings where they differ."""
    return [_row(name, members) for name, members in grouped(runs).items()]


def stat(values: Iterable[float | None]) -> Stat | None:
    """Mean and spread of what was measured; None when some run did not measure it."""
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    if not known or len(known) < len(numbers):
        return None
    if len(known) == 1 or not all(math.isfinite(value) for value in known):
        return Stat(math.fsum(known) / len(known))
    return Stat(statistics.fmean(known), statistics.stdev(known))


def _row(name: str, runs: Sequence[Run]) -> Row:
    """The numbers of one row."""
    language = all(run.language for run in runs)
    by_group = [run.last.get("perplexities" if language else "groups", {}) for run in runs]
    group_names = list(dict.fromkeys(group for found in by_group for group in found))
    groups = {group: stat(found.get(group) for found in by_group) for group in group_names}
    measure = "perplexity" if language else "mean"
    rate = runs[0].config.get("train", {}).get("learning_rate")

    def last(name: str) -> Stat | None:
        return stat(pick(run.last, name) for run in runs)

    def total(name: str) -> Stat | None:
        return stat(math.fsum(value or 0.0 for value in run.values(name)) for run in runs)

    return Row(
        method=name,
        learning_rate=rate,
        seeds=tuple(run.seed for run in runs),
        groups={name: value for name, value in groups.items() if value},
        before=stat(pick(run.rounds[0], measure) for run in runs),
        mean=None if language else last("mean"),
        worst=None if language else last("worst"),
        loss=last("loss"),
        perplexity=last("perplexity"),
        aggregation_error=last("aggregation_error"),
        bytes_up=total("bytes_up"),
        bytes_down=total("bytes_down"),
        seconds=total("seconds"),
        notes=tuple(note for run in runs for note in _notes(name, run)),
        own_rows=_own_rows(runs, "loss" if language else "accuracy"),
        virtual_seconds=last("virtual_seconds"),
    )


def _own_rows(runs: Sequence[Run], measure: str) -> dict[str, Stat]:
    """What clients measured on rows of their own, where all runs did."""
    found = {}
    for kind in runs[0].last.get("own_rows", {}):
        for key, words in (("mean", "mean"), ("worst", "worst 10 %"), ("spread", "spread")):
            told = [run.last.get("own_rows", {}).get(kind, {}).get(measure, {}) for run in runs]
            if value := stat(one.get(key) for one in told):
                found[f"own rows, {kind}, {words}"] = value
    return found


def _notes(name: str, run: Run) -> list[str]:
    """What makes a run less than its config promises."""
    notes = []
    planned, done = run.config.get("rounds"), run.last["round"]
    if planned is not None and done < planned:
        notes.append(f"{name}, seed {run.seed}: only {done} of {planned} rounds were finished")
    failures = sum(len(record.get("failures", ())) for record in run.rounds)
    if failures:
        notes.append(f"{name}, seed {run.seed}: {failures} failed replies, see its rounds.jsonl")
    return notes


def _settings(run: Run, ignored: Sequence[str]) -> dict[str, Any]:
    """The part of a config that must be equal within a row.

    Without privacy, epsilon is infinite and nothing else in ``[privacy]`` means anything.
    """
    settings = {key: value for key, value in whole(run.config).items() if key not in ignored}
    if settings.get("privacy", {}).get("unit") == "none":
        settings["privacy"] = {"epsilon": math.inf}
    return settings


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every key of its tables: what an older version did not know has its default."""
    defaults = RunConfig().model_dump(mode="json", exclude_none=True)
    return {
        key: {**value, **defaults.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in config.items()
    }


def _names(runs: Sequence[Run], ignored: Sequence[str]) -> list[str]:
    """A name for each row: the method, and where two share it, what tells them apart."""
    methods = [str(run.config.get("method", "?")) for run in runs]
    flat = [flattened(_settings(run, ignored)) for run in runs]
    names = []
    for method, settings in zip(methods, flat, strict=True):
        rivals = [other for name, other in zip(methods, flat, strict=True) if name == method]
        differing = [
            f"{key}={value}"
            for key, value in settings.items()
            if any(_differs(key, value, other) for other in rivals)
        ]
        names.append(f"{method} ({', '.join(differing)})" if differing else method)
    return names


def _differs(key: str, value: object, other: Mapping[str, object]) -> bool:
    """Whether a rival has another value; one without privacy has no more of it than epsilon."""
    free = other.get("privacy.epsilon") == math.inf and key.startswith("privacy.")
    return other.get(key, value if free else None) != value


def flattened(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
