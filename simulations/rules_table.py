"""The table of rules: what each says of itself, as the documents show it."""

from __future__ import annotations

from collections.abc import Sequence

from strategies import METHODS
from strategies.base import LoraStrategy

NOTHING = "?"  # a rule that says nothing of itself


def entries() -> list[dict[str, str]]:
    """A row for each entry of ``METHODS``, its cells by their headings."""
    return [{"method": f"`{name}`", **_cells(kind)} for name, kind in METHODS.items()]


def markdown() -> str:
    """The rows as a Markdown table."""
    rows = entries()
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(kind: type[LoraStrategy]) -> dict[str, str]:
    """What a rule says, with its default options."""
    said, sums = kind.traits, kind().summed()
    passes = "no" if sums is None else "2 passes" if sums.two_passes else "1 pass"
    return {
        "exact": said.exact if said else NOTHING,
        "result": said.result if said else NOTHING,
        "ranks": kind.mixed_ranks.way,
        "noise": said.noise if said else NOTHING,
        "client privacy": "yes" if kind.linear else "no",
        "sums": passes,
        "up": _shown(said.up) if said else NOTHING,
        "down": _shown(said.down) if said else NOTHING,
    }


def _shown(formulas: Sequence[str]) -> str:
    """Formulas as people write them."""
    return ", then ".join(formula.replace(" * ", " ") for formula in formulas)
