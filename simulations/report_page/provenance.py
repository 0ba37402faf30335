"""Where numbers come from, as HTML: what was run, its promise, on what, and by which commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from simulations.report_page.comparison import Comparison
from simulations.report_page.markup import Markup, joined, tag
from simulations.run_folders import Run

Table = Mapping[str, Any]  # Any: JSON and TOML values of several kinds
FACTS = {
    "task": ("task.name",),
    "model": ("model.name",),
    "adapter": ("adapter.name", "adapter.rank"),
    "clients": ("clients.number", "clients.split"),
    "rounds": ("rounds",),
    "privacy": ("privacy.unit",),
}
WORDED = {"adapter.rank": "rank {}", "clients.split": "{} split"}
LEFT_OUT = {"privacy.unit": "none"}  # what a configuration without the key means
SHOWN = 4  # different values of one fact
STATED = {  # of privacy.json, by what it is called on the page
    "unit": "unit protected",
    "relation": "neighbours",
    "mechanism": "mechanism",
    "clip": "clip",
    "sampling": "sampling",
    "composition": "composition",
    "accountants": "by other accountants",
    "claim": "noise",
    "assumed": "assumed",
    "not_covered": "not covered",
}
OF_ONE_RUN = ("command", "started", "resumed")  # of environment.json


def facts(runs: Sequence[Run]) -> Markup:
    """What all was run, in a few words each; where runs differ, the different values."""
    found = {name: [_words(run.config, keys) for run in runs] for name, keys in FACTS.items()}
    found["runs"] = [str(len(runs))]
    found["seeds"] = [str(seed) for seed in sorted({run.seed for run in runs})]
    return _pairs({name: _few(values) for name, values in found.items()}, "facts")


def promises(found: Comparison) -> Markup:
    """What each private row promises and has spent, once for rows of which the same is told."""
    told: dict[Markup, list[str]] = {}
    for name, runs in zip(found.names, found.runs.values(), strict=True):
        private = [
            run for run in runs if run.config.get("privacy", {}).get("unit", "none") != "none"
        ]
        if private:
            told.setdefault(_promise(private), []).append(name)
    if not told:
        return tag("p", "No run is private: nothing is promised.")
    return joined(
        *(tag("section", tag("h3", "; ".join(names)), text) for text, names in told.items())
    )


def environments(found: Comparison) -> Markup:
    """The machines and versions that runs had, each once, with the rows that had it."""
    kinds: dict[str, list[str]] = {}
    for name, runs in zip(found.names, found.runs.values(), strict=True):
        for run in runs:
            shared = {k: v for k, v in run.environment.items() if k not in OF_ONE_RUN}
            kinds.setdefault(json.dumps(shared), []).append(f"{name}, seed {run.seed}")
    blocks = []
    for text, names in kinds.items():
        if len(kinds) > 1:
            blocks.append(tag("h3", _few(names)))
        told = dict(_told(key, value) for key, value in json.loads(text).items())
        blocks.append(
            _pairs(told) if told else tag("p", "No environment was kept with these runs.")
        )
    return joined(*blocks)


def commands(found: Comparison) -> Markup:
    """Each command once, with the runs that it made."""
    made: dict[str, list[str]] = {}
    for name, runs in zip(found.names, found.runs.values(), strict=True):
        for run in runs:
            again = [one.get("command") for one in run.environment.get("resumed", [])]
            for command in [run.environment.get("command"), *again]:
                if command:
                    made.setdefault(str(command), []).append(f"{name}, seed {run.seed}")
    if not made:
        return tag(
            "p",
            "No command was kept with these runs. Each configuration below, saved as a file, runs "
            "again with ",
            tag("code", "fedlora run FILE"),
            ".",
        )
    return joined(
        *(
            joined(_code(f"$ {command}"), tag("p", _few(names), class_="note"))
            for command, names in made.items()
        )
    )


def configurations(found: Comparison) -> Markup:
    """The configuration of each row's first seed, as the TOML that runs it again."""
    return joined(
        *(
            tag(
                "details",
                tag("summary", f"{name}, seed {runs[0].seed}"),
                _code(_toml(runs[0].config)),
                data_rule=rule,
            )
            for name, runs, rule in zip(found.names, found.runs.values(), found.rules, strict=True)
        )
    )


def _promise(runs: Sequence[Run]) -> Markup:
    """A private row's statement: what was spent by seed, and the words of the first."""
    asked, stated = runs[0].config["privacy"], runs[0].privacy
    delta = f"at delta {asked.get('delta', '?')} for each {asked.get('unit')}"
    if not stated:
        target = asked.get("epsilon")
        noise = f"noise multiplier {asked.get('noise_multiplier')}"
        wanted = noise if target is None else f"epsilon {_value(target)} at most"
        kept = "The statement of what was spent was not kept with these runs."
        return tag("p", f"Asked for: {wanted} {delta}. {kept}")
    spent = ", ".join(
        f"{_value(run.privacy.get('epsilon', '?'))} (seed {run.seed})" for run in runs
    )
    told = {words: _value(stated[key]) for key, words in STATED.items() if stated.get(key)}
    return joined(
        tag("p", f"{stated.get('covered', '')}: epsilon {spent} {delta}."),
        tag("details", tag("summary", "The statement in full"), _pairs(told)),
    )


def _told(key: str, value: Any) -> tuple[str, str]:
    """A line of an environment in words."""
    if key == "memory_bytes" and isinstance(value, int):
        return "memory", f"{value / 1e9:.1f} GB"
    return key.replace("_", " "), _value(value)


def _pairs(told: Mapping[str, str], kind: str | None = None) -> Markup:
    """A list of names and values."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in told.items()),
        class_=kind,
    )


def _code(text: str) -> Markup:
    """Text as it is, in a box of its own to scroll in."""
    return tag("pre", tag("code", text), tabindex="0")


def _words(config: Table, keys: Sequence[str]) -> str:
    """Some values of a configuration, by dotted keys."""
    values = []
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = LEFT_OUT.get(key, "?") if value is None else value
        values.append(WORDED.get(key, "{}").format(value))
    return ", ".join(values)


def _few(values: Sequence[str]) -> str:
    """Different values, each once; of many the first."""
    different = list(dict.fromkeys(values))
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return "; ".join(different[:SHOWN]) + more


def _value(value: Any) -> str:
    """A JSON value as a reader writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_value, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def _toml(config: Table) -> str:
    """A configuration as TOML; as JSON where TOML cannot hold it."""
    try:
        return tomli_w.dumps(config)
    except (TypeError, ValueError):
        return json.dumps(config, indent=2)
