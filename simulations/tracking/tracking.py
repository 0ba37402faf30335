"""Trackers of a run: which are asked for, and that none of them can end it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from fedlora.config import RunConfig
from fedlora.disk import writing
from fedlora.errors import ConfigError
from fedlora.rounds import RoundRecord
from simulations.results import TRACK, RunFolder
from simulations.spending import spent
from simulations.stopping import still_hearing
from simulations.tracking.event_files import EventFiles
from simulations.tracking.mlflow_runs import MlflowRun
from simulations.tracking.scalars import scalars
from simulations.tracking.weights_and_biases import WandbRun


class Tracker(Protocol):
    """One series of scalars.

    Attributes:
        told: the last round that it holds, -1 for none.
    """

    told: int

    def add(self, round: int, values: Mapping[str, float]) -> None:
        """Tell one round."""

    def close(self, status: Literal["finished", "failed"]) -> None:
        """The run has ended."""


@dataclass(frozen=True)
class Kind:
    """A tracker's library, which is also the extra that brings it, and how a series is opened.

    ``open`` takes a folder for files, the run's configuration and the next round.
    """

    library: str
    open: Callable[[Path, RunConfig, int], Tracker]


TRACKERS = {
    "tensorboard": Kind("tensorboard", EventFiles),
    "wandb": Kind("wandb", WandbRun),
    "mlflow": Kind("mlflow", MlflowRun),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The trackers that ``launch.track`` asks for; ``auto`` is TensorBoard where it is installed.

    Raises:
        ConfigError: a library is not installed.
    """
    found = []
    for name in names:
        kind = TRACKERS["tensorboard" if name == "auto" else name]
        if importlib.util.find_spec(kind.library) is not None:
            found.append("tensorboard" if name == "auto" else name)
        elif name != "auto":
            raise ConfigError(
                f"launch.track: found {name!r}, and the package {kind.library} is not installed; "
                f"install Fedlora with its extra: pip install 'fedlora[{kind.library}]'"
            )
    return list(dict.fromkeys(found))


class Tracking:
    """Tells a run's rounds to its trackers; one that fails is named in a line and left out."""

    def __init__(self, config: RunConfig, results: RunFolder, tell: Callable[[str], None]) -> None:
        """``results`` may hold rounds already: whoever lacks them is told, but for epsilon."""
        self._config, self._results, self._tell = config, results, tell
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        records, place = self._results.records, self._results.path / TRACK
        following = records[-1].round + 1 if records else 0
        for name in chosen(self._config.launch.track):
            with self._surviving(name), still_hearing():
                with writing(place):
                    place.mkdir(exist_ok=True)
                tracker = TRACKERS[name].open(place, self._config, following)
                self._open[name] = tracker
                for record in records:
                    if record.round > tracker.told:
                        tracker.add(record.round, scalars(record))
        return self

    def add(self, record: RoundRecord) -> None:
        """Tell one round that was just done."""
        for name, tracker in [*self._open.items()]:
            with self._surviving(name):
                epsilon = spent(self._config, self._results.path)
                tracker.add(record.round, scalars(record, epsilon))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, tracker in [*self._open.items()]:
            with self._surviving(name):
                tracker.close("finished" if kind is None else "failed")

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Whatever a tracker's library raises ends the tracker alone."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"{name}: {reason}; the run goes on without it")
