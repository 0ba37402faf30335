"""HTML in which everything is escaped that was not made here."""

from __future__ import annotations

import html
import json
from typing import Any

EMPTY = ("br", "input")


class Markup(str):
    """Text that is HTML already; any other string is escaped where it is put into some."""

    __slots__ = ()


def tag(name: str, /, *inside: str, **attributes: str | bool | None) -> Markup:
    """One element. Attributes that are None or False are left out.

    An underscore in an attribute's name stands for a hyphen, one at its end for nothing.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in EMPTY:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(*inside)}</{name}>")


def joined(*parts: str) -> Markup:
    """Parts one after the other."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(part) for part in parts)
    )


def in_script(value: Any) -> Markup:  # Any: JSON values of several kinds
    """Strict JSON that no text in it can lead out of a ``<script>`` element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def grid(heading: list[str], lines: list[list[str]], caption: str) -> Markup:
    """A small table in a box of its own to scroll in; the first cell of a line names it."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption, class_="unseen"),
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heading))),
            tag(
                "tbody",
                *(
                    tag("tr", tag("th", line[0], scope="row"), *(tag("td", c) for c in line[1:]))
                    for line in lines
                ),
            ),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )
