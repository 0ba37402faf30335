"""TensorBoard: a run's event files."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedlora.config import RunConfig

FILES = "events.out.tfevents.*"


class EventFiles:
    """One event file for each time that a run was begun or gone on with.

    Each round is one event, written at once from this thread: where it cannot be, an ``OSError``
    says so, and a process that is forked or killed leaves no writer behind.
    """

    def __init__(self, place: Path, config: RunConfig, following: int) -> None:
        """``following``: the next round; TensorBoard drops what older files tell from it on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        number = len([*place.glob(FILES)])
        self._path, self._event = place / FILES.replace("*", f"{number:06d}"), Event
        self.told = following - 1 if number else -1
        first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if number:
            start = SessionLog(status=SessionLog.START)
            first += [Event(wall_time=time.time(), step=following, session_log=start)]
        self._append(*first)

    def add(self, round: int, values: Mapping[str, float]) -> None:
        """Write one round."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(self._event(wall_time=time.time(), step=round, summary=Summary(value=numbers)))

    def close(self, status: Literal["finished", "failed"]) -> None:
        """Nothing is open."""

    def _append(self, *events: Any) -> None:  # Any: protobuf makes their type
        """Write events, each as a record of its length, its bytes and their checksums."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        data = io.BytesIO()
        for event in events:
            RecordWriter(data).write(event.SerializeToString())
        with self._path.open("ab") as file:
            file.write(data.getvalue())
