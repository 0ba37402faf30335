"""What a person sees while a run is under way: live bars on a terminal, else one line a round.

Everything here goes to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as Bar
from rich.text import Text

if TYPE_CHECKING:  # rounds.py loads torch, which `fedlora --help` must not wait for
    from fedlora.rounds import RoundRecord

Stage = Literal["train", "evaluate"]


class Stopped(Exception):  # noqa: N818 (Ctrl-C is no error)
    """The user stopped a command; ``folder`` holds what was finished, if it is known."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.folder = folder


class Progress:
    """Listens to runs and shows nothing; the parent of the two that do.

    Attributes:
        folder: where results are being written, once known; Ctrl-C tells it to the user.
    """

    folder: Path | None = None

    def saving_to(self, folder: Path) -> None:
        """Results are being written to ``folder``."""
        self.folder = folder

    def run_started(self, title: str, rounds: int) -> None:
        """A run begins; ``rounds`` leaves out round 0, the measurement before training."""

    def stage_started(self, round: int, stage: Stage, messages: int) -> None:
        """So many clients have been asked to train or to evaluate."""

    def replied(self, failed: bool) -> None:
        """One of the clients of this stage has answered or been given up."""

    def round_done(self, record: RoundRecord) -> None:
        """A round has ended and its record been written."""

    def run_done(self) -> None:
        """The run has ended; another may follow."""

    def run_failed(self) -> None:
        """The run has ended before its time; another may follow."""

    def cells_done(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many runs of a sweep are done; None before there is anything to tell the rest from."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Lines(Progress):
    """One line for each finished round, for logs and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.title, self.rounds = "", 0

    def run_started(self, title: str, rounds: int) -> None:
        """Remember what the next lines belong to."""
        self.title, self.rounds = title, rounds

    def round_done(self, record: RoundRecord) -> None:
        """Print the round's numbers, then one line for each failure."""
        self.note(f"{self.title}: round {record.round}/{self.rounds}  {numbers(record)}")
        for line in failures(record):
            self.note(f"{self.title}: round {record.round}: {line}")

    def cells_done(self, done: int, total: int, seconds_left: float | None) -> None:
        """Print how far the sweep is."""
        left = "" if seconds_left is None else f", about {minutes(seconds_left)} left"
        self.note(f"sweep: {done} of {total} cells done{left}")

    def note(self, text: str) -> None:
        """Print the text as it stands, on one line however long."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveBars(Progress):
    """A bar of rounds over a bar of the clients in the present stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeLeft(),
            TextColumn("{task.fields[last]}", markup=False),
            console=self.console,
            expand=True,
        )
        self.title, self.rounds, self.last, self.failed = "", 0, "", 0
        self.round_seconds: list[float] = []
        self.started = 0.0
        self.cells_bar: TaskID | None = None

    def run_started(self, title: str, rounds: int) -> None:
        """Open the bars."""
        self.title, self.rounds, self.last = title, rounds, ""
        self.round_seconds, self.started = [], time.monotonic()
        self.run_bar = self.bars.add_task(title, total=rounds, last="", deadline=None)
        self.stage_bar = self.bars.add_task("  starting", total=None, last="", deadline=None)
        self.bars.start()

    def stage_started(self, round: int, stage: Stage, messages: int) -> None:
        """Begin the clients' bar afresh."""
        self.failed = 0
        self.bars.reset(
            self.stage_bar,
            total=messages,
            description=f"  round {round}: {stage:<8}",
            last="",
            deadline=None,
        )

    def replied(self, failed: bool) -> None:
        """Move the clients' bar on by one."""
        self.failed += failed
        last = f"{self.failed} failed" if self.failed else ""
        self.bars.update(self.stage_bar, advance=1, last=last)

    def round_done(self, record: RoundRecord) -> None:
        """Move the rounds' bar on, and keep failures in sight above it."""
        for line in failures(record):
            self.note(f"{self.title}: round {record.round}: {line}")
        deadline = None
        if record.round > 0:
            self.round_seconds.append(record.seconds)
            mean = sum(self.round_seconds) / len(self.round_seconds)
            deadline = time.monotonic() + mean * (self.rounds - record.round)
        self.last = scores(record)
        self.bars.update(self.run_bar, completed=record.round, last=self.last, deadline=deadline)

    def run_failed(self) -> None:
        """Take the run's bars away, if it has come so far as to have some."""
        self._remove()

    def cells_done(self, done: int, total: int, seconds_left: float | None) -> None:
        """Move the sweep's own bar on, which stays above those of its runs."""
        if self.cells_bar is None:
            self.cells_bar = self.bars.add_task("sweep", total=total, last="", deadline=None)
        deadline = None if seconds_left is None else time.monotonic() + seconds_left
        self.bars.update(self.cells_bar, completed=done, deadline=deadline)

    def run_done(self) -> None:
        """Put one line in the place of the bars."""
        seconds = time.monotonic() - self.started
        done = self.bars.tasks[self.bars.task_ids.index(self.run_bar)].completed
        self._remove()
        self.note(f"{self.title}: {done:.0f}/{self.rounds} rounds in {seconds:.0f} s  {self.last}")

    def note(self, text: str) -> None:
        """Print the text above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing; the bars of an unfinished run stay as they were."""
        self.bars.stop()

    def _remove(self) -> None:
        """Take the run's bars away."""
        for bar in list(self.bars.task_ids):
            if bar != self.cells_bar:
                self.bars.remove_task(bar)


class TimeLeft(ProgressColumn):
    """Counts down to the end that the mean round so far predicts."""

    def render(self, task: Bar) -> Text:
        """Minutes and seconds, or nothing before round 1 has ended."""
        deadline = task.fields["deadline"]
        if deadline is None or task.finished:
            return Text("")
        return Text(f"{minutes(deadline - time.monotonic())} left", style="progress.remaining")


def minutes(seconds: float) -> str:
    """Minutes and seconds, with a colon, and hours where there are any."""
    left = max(0, round(seconds))
    hours = f"{left // 3600}:{left // 60 % 60:02d}" if left >= 3600 else str(left // 60)
    return f"{hours}:{left % 60:02d}"


def scores(record: RoundRecord) -> str:
    """Loss and accuracy, or perplexity, of a round, as far as it has them."""
    parts = [
        f"{name} {value:.3f}"
        for name, value in [
            ("loss", record.loss),
            ("accuracy", record.accuracy),
            ("perplexity", record.perplexity),
        ]
        if value is not None
    ]
    return "  ".join(parts)


def numbers(record: RoundRecord) -> str:
    """All that a round's line tells."""
    parts = [scores(record)]
    if record.round > 0:
        if record.aggregation_error is not None:
            parts.append(f"aggregation error {record.aggregation_error:.2g}")
        if not record.merged:
            parts.append("not merged")
    return "  ".join([*filter(None, parts), f"{record.seconds:.1f} s"])


def failures(record: RoundRecord) -> list[str]:
    """One line for each client, or whole round, that did not count."""
    return [
        f"{'the round' if failure.client is None else f'client {failure.client}'} "
        f"did not count ({failure.stage}): {failure.reason}"
        for failure in record.failures
    ]


def for_terminal(quiet: bool = False) -> Progress:
    """Live bars where stderr is a terminal, lines where it is not, nothing when quiet."""
    if quiet:
        return Progress()
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return LiveBars()
    return Lines()
