"""A run's progress and results in the log of its server app, and out of it again."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from fedlora.errors import FedloraError
from fedlora.rounds import RoundRecord
from simulations.progress import Progress

MARK = "fedlora-event "
LARGEST_MEGABYTES = 64
PIECE = 512 * 1024  # bytes in one line; a log is uploaded five times a second
BREATH = 0.25  # seconds, so that lines are uploaded one by one

Event = dict[str, Any]  # Any: JSON


class Told(Progress):
    """Prints what happens, a line each, for ``Listener`` to read."""

    def __init__(self, stream: TextIO | None = None, breath: float = BREATH) -> None:
        self._stream, self._breath = stream, breath

    def saving_to(self, folder: Path) -> None:
        """Tell where results lie on the server's machine."""
        super().saving_to(folder)
        self._tell("folder", path=str(folder.resolve()))

    def run_started(self, title: str, rounds: int) -> None:
        """Tell what begins."""
        self._tell("started", title=title, rounds=rounds)

    def round_done(self, record: RoundRecord) -> None:
        """Tell a round's record."""
        self._tell("round", record=record.as_json())

    def note(self, text: str) -> None:
        """Tell what is worth a line."""
        self._tell("note", text=text)

    def run_done(self) -> None:
        """Tell that all results are written."""
        self._tell("done")

    def refused(self, error: FedloraError) -> None:
        """Tell why the run ends, which another try would not mend."""
        self._tell("refused", text=str(error))

    def send(self, folder: Path) -> None:
        """Send the files of a finished run, but for those that are too large."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, size = str(path.relative_to(folder)), path.stat().st_size
            if size > LARGEST_MEGABYTES * 10**6:
                self.note(f"{path}: {size / 1e6:.0f} MB, left where it is; copy it by hand")
                continue
            data = path.read_bytes()
            for start in range(0, max(size, 1), PIECE):
                piece = base64.b64encode(data[start : start + PIECE]).decode()
                self._tell("file", name=name, start=start, data=piece)
                time.sleep(self._breath * (size > PIECE))
        self._tell("sent")

    def _tell(self, kind: str, **told: object) -> None:
        """Print one event as one line, in one call, so that no other line gets inside."""
        stream = self._stream or sys.stdout
        stream.write(f"{MARK}{json.dumps({'kind': kind, **told})}\n")
        stream.flush()


class Listener:
    """Hands the events of a log to a ``Progress``, and writes files that come with it.

    Attributes:
        place: the run's folder on the server's machine, once told.
        refused: why our server app ended, if it did over an error of ours.
        done: whether all results are there.
        sent: whether all of them have been sent, but for what was noted.
    """

    def __init__(self, progress: Progress, into: Path | None = None) -> None:
        """``into`` takes the run's files; None takes none."""
        self._progress, self._into, self._rest = progress, into, ""
        self.place, self.refused, self.done, self.sent = "", "", False, False

    def hear(self, text: str) -> None:
        """Take the next piece of a log, which may end in the middle of a line.

        Raises:
            FedloraError: a file would land outside its folder.
        """
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            _, marked, event = line.partition(MARK)
            if marked:
                try:
                    told = json.loads(event)
                except ValueError:
                    continue  # another program's line that holds our mark
                self._heard(told)

    def _heard(self, told: Event) -> None:
        """One event."""
        kind = told.get("kind")
        if kind == "folder":
            self.place = told["path"]
        elif kind == "started":
            self._progress.run_started(told["title"], told["rounds"])
        elif kind == "round":
            self._progress.round_done(RoundRecord.from_json(told["record"]))
        elif kind == "note":
            self._progress.note(told["text"])
        elif kind == "done":
            self.done = True
            self._progress.run_done()
        elif kind == "refused":
            self.refused = told["text"]
        elif kind == "sent":
            self.sent = True
        elif kind == "file" and self._into:
            self._write(self._into, told)

    def _write(self, folder: Path, told: Event) -> None:
        """One piece of a file."""
        path = (folder / told["name"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise FedloraError(f"results: found a file {told['name']!r}, allowed: inside {folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if told["start"] else "wb") as file:
            file.seek(told["start"])
            file.write(base64.b64decode(told["data"]))
