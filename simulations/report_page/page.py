"""One page of the runs: the template with everything it shows, and nothing that it must fetch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from fedlora.disk import writing
from simulations.figures import curves
from simulations.report_page import provenance
from simulations.report_page.charts import Chart, charts
from simulations.report_page.comparison import Comparison, compared
from simulations.report_page.dealt import dealings
from simulations.report_page.markup import Markup, in_script, joined, tag
from simulations.report_page.results_table import explained, results_table, tests_table
from simulations.run_folders import Run
from simulations.tables import as_json, notes

NAME = "report.html"
FEW = 3  # notes that are shown at once
SCRIPTS = ("marks.js", "table.js", "charts.js")


def write_page(runs: Sequence[Run], folder: Path) -> tuple[Path, ...]:
    """Write ``report.html`` and ``curves.svg`` into a folder that is there; return their paths.

    Raises:
        ConfigError: they cannot be written, or two runs are no two samples.
    """
    paths = folder / NAME, folder / "curves.svg"
    text = page(runs)
    with writing(paths[0]):
        paths[0].write_text(text, encoding="utf-8")
    curves(runs, paths[1])
    return paths


def page(runs: Sequence[Run]) -> str:
    """The page as HTML, the same for the same runs and the same data at hand."""
    found = compared(runs)
    drawn = charts(found, runs)
    dealt, missing = dealings(runs)
    names = "; ".join(dict.fromkeys(str(run.config.get("name", "?")) for run in runs))
    style, script = _file("report.css"), "".join(map(_file, SCRIPTS))
    data = {
        "rows": as_json(found.rows),
        "names": found.names,
        "rules": found.rules,
        "charts": [*drawn, *dealt],
    }
    parts = {
        "policy": (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "title": tag("title", f"{names} – Fedlora report"),  # noqa: RUF001
        "style": Markup(style),
        "name": joined(names),
        "facts": provenance.facts(runs),
        "filters": _filters(found),
        "table": results_table(found),
        "explained": tag("p", explained(found), class_="note"),
        "notes": _notes(notes(found.rows)),
        "tests": _tests(found),
        "figures": _figures(drawn),
        "dealt": _dealt(dealt, missing),
        "promises": provenance.promises(found),
        "environments": provenance.environments(found),
        "commands": provenance.commands(found),
        "configurations": provenance.configurations(found),
        "data": in_script(data),
        "script": Markup(script),
    }
    return Template(_file("report.html")).substitute(parts)


def _filters(found: Comparison) -> Markup:
    """A box to tick for each rule, and a choice of conditions where rows differ in them."""
    rules, conditions = (list(dict.fromkeys(one)) for one in (found.rules, found.conditions))
    boxes = [
        tag("label", tag("input", type="checkbox", name="rule", value=rule, checked=True), rule)
        for rule in rules
    ]
    parts: list[Markup] = []
    if len(rules) > 1:
        parts.append(tag("fieldset", tag("legend", "Rules"), *boxes))
    if len(conditions) > 1:
        options = [tag("option", "all", value="*")]
        options += [tag("option", condition, value=condition) for condition in conditions]
        parts.append(tag("label", "Conditions ", tag("select", *options, name="condition")))
    return tag("form", *parts, class_="filters needs-script") if parts else Markup()


def _notes(found: Sequence[str]) -> Markup:
    """What a reader of the numbers must know; many notes are folded away, but for the last."""
    lines = [tag("p", note, class_="note") for note in found]
    if len(lines) <= FEW:
        return joined(*lines)
    folded = tag("details", tag("summary", f"{len(lines) - 1} notes on runs"), *lines[:-1])
    return joined(lines[-1], folded)


def _tests(found: Comparison) -> Markup:
    """All tests, folded away; nothing where there is none."""
    if not any(found.verdicts.values()):
        return Markup()
    interval = tag(
        "p",
        "Difference: highest (for losses lowest) mean minus the other, over the seeds in common. "
        "The interval is of this pair alone, p is corrected by Holm over the pairs of one score.",
        class_="note",
    )
    return tag("details", tag("summary", "All paired tests"), interval, tests_table(found))


def _figures(drawn: Sequence[Chart]) -> Markup:
    """A place for each chart, with its title in it."""
    return joined(
        *(
            tag(
                "figure",
                tag(
                    "figcaption",
                    tag("h3", chart["title"]),
                    *([tag("p", chart["note"], class_="note")] if chart.get("note") else []),
                ),
                tag("div", class_="chart"),
                data_chart=chart["id"],
            )
            for chart in drawn
        )
    )


def _dealt(drawn: Sequence[Chart], missing: Sequence[str]) -> Markup:
    """How data was dealt, and what of it cannot be shown."""
    parts = [tag("p", f"Not shown. {reason}", class_="note") for reason in missing]
    if drawn:
        words = "Dealt again from the configuration and the seed. "
        words += "These counts are of the training data itself; no promise of privacy covers them."
        parts.insert(0, tag("p", words, class_="note"))
        parts.insert(1, tag("div", _figures(drawn), class_="figures needs-script"))
    return joined(*parts)


def _file(name: str) -> str:
    """A file of this package."""
    return resources.files("simulations.report_page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a browser must find of a script or style that the page may run."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
