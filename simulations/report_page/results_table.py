"""The comparison table and the tests behind its marks, as HTML."""

from __future__ import annotations

from simulations.report import Row
from simulations.report_page.comparison import Comparison, more_is_better
from simulations.report_page.markup import Markup, grid, joined, tag
from simulations.report_page.paired import FEWEST, Against, Verdict
from simulations.tables import BLANK, Column


def results_table(found: Comparison) -> Markup:
    """A line for each row; cells tell every seed's number and the test in their titles."""
    heads = ["method", *(column.heading for column in found.columns), "learning rate", "seeds"]
    keys = ["", *(column.key for column in found.columns), "learning_rate", "seeds"]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", "Comparison, mean and spread over seeds", class_="unseen"),
            tag("thead", tag("tr", *map(_heading, heads, keys))),
            tag("tbody", *(_line(found, place) for place in range(len(found.rows)))),
            id="comparison",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="Comparison table",
    )


def tests_table(found: Comparison) -> Markup:
    """Every paired test: the best row of each score against the others."""
    lines = []
    for column in found.columns:
        for one in found.verdicts.get(column.key, []):
            name = found.names[one.best]
            for pair in one.against:
                lines.append([column.heading, name, *_tested(found, pair), _word(one, pair)])
    heading = ["score", "highest or lowest mean", "against", "seeds in common"]
    return grid([*heading, "difference", "95 % interval", "p", ""], lines, "Paired tests")


def explained(found: Comparison) -> str:
    """What a mark means, or why there is none, in a sentence or two."""
    verdicts = [one for several in found.verdicts.values() for one in several]
    if not verdicts:
        return ""
    under = " under the same conditions" if any(found.conditions) else ""
    rule = (
        f"A score is marked as best where it leads every other row{under} in a paired t-test over "
        f"the seeds in common, at least {FEWEST}, with p below 0.05 after Holm's correction over "
        "those rows."
    )
    most = max((len(pair.seeds) for one in verdicts for pair in one.against), default=0)
    if most < FEWEST:
        seeds = "1 seed" if most == 1 else f"{most or 'no'} seeds"
        return f"{rule} None is: rows here have {seeds} in common."
    marked = sum(one.supported for one in verdicts)
    return f"{rule} Here that holds for {marked} of {len(verdicts)} scores."


def _heading(heading: str, key: str) -> Markup:
    """A heading that sorts: with the better end of a score first."""
    first = "ascending" if heading == "method" or more_is_better(key) is False else "descending"
    button = tag("button", heading, type="button", data_first=first)
    return tag("th", button, scope="col", aria_sort="none", class_="number" if key else None)


def _line(found: Comparison, place: int) -> Markup:
    """One row."""
    row, condition = found.rows[place], found.conditions[place]
    rate = BLANK if row.learning_rate is None else f"{row.learning_rate:g}"
    seeds = ", ".join(map(str, row.seeds))
    method, settings = found.rules[place], found.names[place].removeprefix(found.rules[place])
    details = tag("span", settings.lstrip(" ,"), class_="settings") if settings else Markup()
    name = tag("span", tag("span", class_="swatch"), method, details, class_="name")
    return tag(
        "tr",
        tag("th", name, scope="row", title=row.method if settings else None),
        *(_cell(found, place, column) for column in found.columns),
        tag("td", rate, class_="number", data_value=_number(row.learning_rate)),
        tag("td", seeds, class_="number", data_value=str(len(row.seeds))),
        data_row=str(place),
        data_rule=found.rules[place],
        data_condition=condition,
    )


def _cell(found: Comparison, place: int, column: Column) -> Markup:
    """One number with its spread; the best in bold, if that is supported."""
    row, text = found.rows[place], column.cell(found.rows[place])
    mean, plus, spread = text.partition(" ± ")
    one, words = _verdict(found, place, column.key)
    best = one is not None and one.supported and one.best == place
    marks: list[str] = [tag("strong", mean) if best else mean]
    if best:
        marks.append(tag("span", " best", class_="unseen"))
    if plus:
        marks.append(tag("span", f" ± {spread}", class_="spread"))
    seeds = "; ".join(
        f"seed {seed}: {format(value / column.unit, column.digits)}"
        for seed, value in found.values[column.key][place].items()
    )
    return tag(
        "td",
        joined(*marks),
        title=". ".join(filter(None, (seeds, words))) or None,
        class_="number best" if best else "number",
        data_value=_value(row, column),
    )


def _verdict(found: Comparison, place: int, key: str) -> tuple[Verdict | None, str]:
    """The verdict that a cell is part of, and what it says of the cell."""
    for one in found.verdicts.get(key, []):
        if one.best == place:
            words = [f"against {found.names[pair.other]}: {_p(pair)}" for pair in one.against]
            return one, "; ".join(words)
        for pair in one.against:
            if pair.other == place:
                return one, f"{found.names[one.best]} against this: {_p(pair)}"
    return None, ""


def _p(pair: Against) -> str:
    """A test's outcome, or why there is none."""
    if pair.p is not None:
        return f"p = {pair.p:.2g} over {len(pair.seeds)} seeds"
    if len(pair.seeds) < FEWEST:
        return f"not tested, {len(pair.seeds)} of {FEWEST} seeds in common"
    return "not tested, the difference is the same for every seed"


def _tested(found: Comparison, pair: Against) -> list[str]:
    """The cells of one test."""
    interval = (
        BLANK if pair.interval is None else f"{pair.interval[0]:+.3g} to {pair.interval[1]:+.3g}"
    )
    return [
        found.names[pair.other],
        ", ".join(map(str, pair.seeds)) or "none",
        BLANK if pair.lead is None else f"{pair.lead:+.3g}",
        interval,
        BLANK if pair.p is None else f"{pair.p:.2g}",
    ]


def _word(one: Verdict, pair: Against) -> str:
    """What a test says, in a word."""
    if pair.p is None:
        return _p(pair)
    return "supported" if pair.p < 0.05 else "not supported"


def _value(row: Row, column: Column) -> str | None:
    """A cell's number for sorting."""
    stat = column.read(row)
    return None if stat is None else _number(stat.mean)


def _number(value: float | None) -> str | None:
    """A number as scripts read it."""
    if value is None:
        return None
    return repr(value).replace("inf", "Infinity") if value == value else None
