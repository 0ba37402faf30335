"""One Ray process that runs clients, and the driver's end of it."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import ray
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlora.config import ClientConfig, LaunchConfig
from fedlora.errors import FedloraError
from fedlora.records import arrays_in
from simulations.grid import identify
from simulations.heap import keep_heap
from simulations.installed import installed
from simulations.parcels import Parcel, unwrap, wrap
from simulations.profiling import Seconds, timed_work
from simulations.ray_nodes import Node
from simulations.schedule import Job
from simulations.shipping import cargo, unload
from simulations.summing import Reducer


@dataclass(frozen=True)
class Report:
    """What a worker says once it has started.

    Attributes:
        problem: why it cannot do its work here; empty if it can.
        installed: see ``simulations.installed``.
    """

    problem: str
    installed: Mapping[str, str]


@dataclass(frozen=True)
class Needs:
    """What workers load as they start.

    Attributes:
        config: a ``ClientConfig`` as JSON, of which task and base model; empty for nothing.
        shipped: what nodes may take of it from here; see ``simulations.shipping``.
        stored: Ray's reference to that, if there is any; in a list, so that Ray brings it to nobody
            who does not ask.
    """

    config: str = ""
    shipped: tuple[str, ...] = ()
    stored: tuple[Any, ...] = ()  # Any: see Hand

    @staticmethod
    def of(config: ClientConfig | None, ship: bool) -> Needs:
        """The needs of a run's clients.

        Raises:
            ConfigError: what is to be shipped is not here.
        """
        if config is None:
            return Needs()
        files = cargo(config) if ship else {}
        content = {name: path.read_bytes() for name, path in files.items()}
        stored = (ray.put(content),) if files else ()
        return Needs(config.model_dump_json(), tuple(files), stored)


class Worker:
    """The client app, in it the resident base model, and the arrays of the round that runs."""

    def __init__(self, app: str, threads: int, needs: Needs) -> None:
        """Import the app (``module:attribute``) and set this process's torch threads.

        ``report`` loads what it ``needs``.
        """
        torch.set_num_threads(threads)
        keep_heap()
        identify()
        module, _, name = app.partition(":")
        self._app = cast(ClientApp, getattr(import_module(module), name))
        self._shared: Mapping[str, ArrayRecord] = {}
        self._reducer = Reducer()
        self._needs = needs

    def report(self) -> Report:
        """Load what the first clients will need, and say whether it is here."""
        problem = ""
        needs = self._needs
        if needs.config:
            try:
                unload(needs.shipped, lambda: ray.get(needs.stored[0]))
                from clients.resident import resident  # its libraries take seconds to import

                resident(ClientConfig.model_validate_json(needs.config))
            except FedloraError as error:
                problem = str(error)
            except Exception as error:  # whatever stops it here stops every client
                problem = f"{type(error).__name__}: {error}"
        return Report(" ".join(problem.split()), dict(installed()))

    def run(self, work: Parcel, shared: Parcel | None) -> tuple[Parcel, float]:
        """The app's replies with the contexts as it left them, and the seconds that it took.

        Args:
            work: messages and contexts.
            shared: the array records that all messages have besides; None for the last ones.
        """
        if shared is not None:
            self._shared = {}  # two would not be needed at a time
            self._shared = unwrap(shared)
        messages, contexts = unwrap(work)
        for message in messages:
            message.content.update(self._shared)
        started = time.perf_counter()
        replies = self._reducer.answers(self._app, messages, contexts)
        return wrap((replies, contexts)), time.perf_counter() - started

    def run_timed(
        self, work: Parcel, shared: Parcel | None
    ) -> tuple[tuple[Parcel, float], Seconds]:
        """As ``run``, and the seconds of each part of it."""
        return timed_work(self.run, work, shared)

    def held(self, token: str) -> list[tuple[int, ...]]:
        """See ``Reducer.held``."""
        return self._reducer.held(token)

    def again(self, pack: tuple[int, ...], told: ArrayRecord) -> ArrayRecord:
        """See ``Reducer.again``."""
        return self._reducer.again(pack, told)


@dataclass(eq=False)
class Hand:
    """The driver's end of a worker.

    Attributes:
        number: its place in the pool.
        node: where it is.
        actor: Ray's handle.
        queue: what was given to it, in order, with Ray's references to what comes back.
        holds: the name of the arrays that were sent to it last.
        starting: what comes when it has started, or cannot; until then it gets no job.
    """

    number: int
    node: Node
    actor: Any = None  # Any: Ray's handles and references have no static type
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    holds: object = None
    starting: Any = None


def start_worker(app: str, launch: LaunchConfig, node: str, needs: Needs) -> Any:  # Any: see Hand
    """A fresh worker on a node, with the launch's resources; it fails if the node is gone."""
    kind: Any = ray.remote(Worker)
    options = kind.options(
        num_cpus=launch.cpus(),
        num_gpus=launch.num_gpus,
        resources=launch.resources,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return options.remote(app, launch.threads, needs)


@dataclass(eq=False)
class SharedArrays:
    """Array records that several messages have in common.

    Attributes:
        records: by their keys.
        name: what a worker that has them is known by; unlike this object, it holds no arrays.
        stored: where they lie in Ray's object store, if they do.
    """

    records: Mapping[str, ArrayRecord]
    name: object = field(default_factory=object)
    stored: Any = None  # Any: see Hand

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(record.count_bytes() for record in self.records.values())

    def send(self, hand: Hand) -> Any:  # Any: see Hand
        """What a worker is to be given beside its job: nothing if it has these arrays."""
        if hand.holds is self.name:
            return None
        if self.stored is None:
            self.stored = ray.put(wrap(dict(self.records)))
        hand.holds = self.name
        return self.stored


class Shelf:
    """The arrays that a stage's messages share; each set is sent to a worker once.

    Attributes:
        largest: bytes of the largest set so far.
    """

    def __init__(self) -> None:
        """Know none."""
        self.largest = 0
        self._sets: dict[tuple[int, ...], SharedArrays] = {}  # which keep the ids' objects alive

    def split(self, messages: Sequence[Message]) -> tuple[SharedArrays, list[Message]]:
        """The array records that all messages share, and the messages without those."""
        records = arrays_in(messages[0].content)
        same = tuple(map(id, records.values()))
        if any(tuple(map(id, arrays_in(m.content).values())) != same for m in messages):
            records, same = {}, ()
        if same not in self._sets:
            self._sets[same] = SharedArrays(records)
            self.largest = max(self.largest, self._sets[same].bytes)
        return self._sets[same], [_without(message, records) for message in messages]


def _without(message: Message, records: Mapping[str, ArrayRecord]) -> Message:
    """A message without some of its records; the one that was given stays as it is."""
    rest = {key: record for key, record in message.content.items() if key not in records}
    light = copy.copy(message)
    light.content = RecordDict(rest)
    return light
