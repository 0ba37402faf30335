"""A Flower grid on Ray: long-lived workers, each with one resident base model."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from flwr.app import ArrayRecord, Message

from fedlora.config import ClientConfig, LaunchConfig
from fedlora.errors import FedloraError
from fedlora.stopwatch import turn
from simulations.answers import failed
from simulations.grid import LocalGrid
from simulations.heap import keep_heap
from simulations.parcels import unwrap, wrap
from simulations.placement import Costs
from simulations.progress import Progress
from simulations.ray_cluster import join_ray
from simulations.ray_pool import LOOK, Pool
from simulations.ray_worker import Hand, Needs, Shelf
from simulations.schedule import Job, Schedule
from strategies.adding import Totals, to_tensors

QUICK = 0.1  # seconds up to which a job is worth having the next one ready behind it
HEAVY = 2**22  # bytes of arrays in a message from which it is not


class RayGrid(LocalGrid):
    """Runs clients on a pool of Ray workers, the packs that take longest first.

    Which worker runs a client, and when, changes nothing in its result. A worker that dies is
    replaced and its client tried again, twice at most; a client that outlives ``timeout`` is left
    out and its worker replaced, so that nothing is left running. Nothing waits for a worker that is
    starting. On a cluster, workers come and go with nodes; see ``Pool``.
    """

    def __init__(
        self,
        client_app: str,
        clients: int,
        launch: LaunchConfig,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
        needs: ClientConfig | None = None,
    ) -> None:
        """Start or join Ray and start the workers.

        Args:
            client_app: ``module:attribute``, imported in each worker.
            clients: how many; client k is node k.
            launch: workers, what each reserves, and the cluster's address.
            run_config: see ``LocalGrid``.
            progress: see ``LocalGrid``.
            needs: the task and base model that workers load as they start.

        Raises:
            ConfigError: the cluster cannot be joined, or has no room for one worker.
        """
        super().__init__(clients, run_config, progress)
        keep_heap()
        self._costs: defaultdict[str, Costs] = defaultdict(Costs)  # by type of message
        self._joined = join_ray(launch)
        try:
            wanted = Needs.of(needs, launch.ship)
            grows = bool(launch.address) or not self._joined
            self._pool = Pool(client_app, launch, clients, grows, wanted, self.progress.note)
        except BaseException:
            self._leave()
            raise

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        """Messages to free workers until all are answered or ``timeout`` seconds are over.

        While nobody takes the replies, each worker does what it was given and no more.

        Raises:
            FedloraError: an earlier call's replies were neither all taken nor given up.
        """
        if any(hand.queue for hand in self._hands):
            raise FedloraError(
                "grid: found replies of an earlier stage that nobody took, allowed: one stage at a "
                "time; take them all, or close their iterator"
            )
        end = None if timeout is None else time.monotonic() + timeout
        schedule, shelf = Schedule.of(messages, self._costs), Shelf()
        turn("waiting")
        try:
            self._pool.look()
            while self._hand_out(schedule, shelf):
                hand = self._first_done(end)
                if hand is None:
                    yield from self._give_up(schedule, timeout)
                    return
                replies = self._collect(hand, schedule) if hand.queue else []
                self._hand_out(schedule, shelf)
                while replies:
                    yield replies.pop(0)
        except BaseException:
            for hand in list(self._hands):
                if hand.queue:
                    self._pool.replace(hand)
            raise

    def ready(self) -> None:
        """Wait until every worker has imported the app, or cannot.

        Raises:
            FedloraError: not one can.
        """
        while starting := [hand for hand in self._hands if hand.starting is not None]:
            ray.wait([starting[0].starting])
            self._pool.started(starting[0])
        self._pool.look()

    def workers(self) -> int:
        """As many as there are now."""
        return len(self._hands)

    @property
    def _hands(self) -> list[Hand]:
        return self._pool.hands

    def sum_again(self, token: str, told: ArrayRecord) -> Totals:
        """Packs in order, one more in the making than there are workers; lost ones are left out."""
        stored, totals, holders = ray.put(told), Totals(), {}
        started = [hand for hand in self._hands if hand.starting is None]
        asked = [(hand, hand.actor, hand.actor.held.remote(token)) for hand in started]
        for hand, actor, held in asked:
            for pack in self._get(hand, actor, held) or ():
                holders[pack] = hand, actor
        coming: deque[tuple[tuple[int, ...], Any]] = deque()  # Any: see Hand
        left = deque(sorted(holders))
        while left or coming:
            while left and len(coming) <= len(self._hands):
                pack = left.popleft()
                coming.append((pack, holders[pack][1].again.remote(pack, stored)))
            pack, reference = coming.popleft()
            arrays = self._get(*holders[pack], reference)
            if arrays is not None:
                totals = totals.plus(pack, to_tensors(arrays))
        return totals

    def _get(self, hand: Hand, actor: Any, reference: Any) -> Any:  # Any: see Hand
        """What an actor returns; None if it died, and a fresh one takes its place."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayError:
            if hand.actor is actor:
                self._pool.replace(hand)
            return None

    def close(self) -> None:
        """Stop the workers, and leave Ray, which ends it if it was started here."""
        self._pool.close()
        self._leave()

    def _leave(self) -> None:
        """Leave Ray, if it was joined here."""
        if self._joined:
            ray.shutdown()

    def _hand_out(self, schedule: Schedule, shelf: Shelf) -> bool:
        """A job to each idle worker, then perhaps one ahead; whether any is still to be done.

        A job goes ahead to a worker whose own is likely to be quick. But none does while fewer wait
        than there are workers, since whoever is free first should take those; nor where arrays are
        large, since the replies would wait in memory; nor to a worker whose job may kill it, since
        another's reply could be lost with it.
        """
        for hand in self._hands:
            idle = not hand.queue and hand.starting is None
            if idle and (job := schedule.take(hand.number)):
                self._start(hand, job, shelf)
        for hand in self._hands if shelf.largest < HEAVY else ():
            if len(hand.queue) == 1 and len(schedule.waiting) >= len(self._hands):
                job = hand.queue[0][1]
                if not job.alone and schedule.costs.likely(job.nodes) <= QUICK:
                    self._start(hand, schedule.next(hand.number), shelf)
        return any(hand.queue for hand in self._hands) or schedule.left()

    def _start(self, hand: Hand, job: Job, shelf: Shelf) -> None:
        """Send a job to a worker, and the shared arrays where it has others."""
        shared, messages = shelf.split(job.messages)
        work = wrap((messages, [self.contexts[node] for node in job.nodes]))
        run, job.sent = hand.actor.run, time.perf_counter()
        if self.profiler is not None:
            run = hand.actor.run_timed
        hand.queue.append((run.remote(work, shared.send(hand)), job))
        if all(other.holds is shared.name for other in self._hands):
            shared.stored = None  # whoever comes in the place of a worker has them stored anew

    def _first_done(self, end: float | None) -> Hand | None:
        """A worker that is done with the first of its jobs, or has started, and then has none.

        None if there is none before ``end``. Meanwhile workers may come.
        """
        while True:
            heads = {hand.starting: hand for hand in self._hands if hand.starting is not None}
            heads |= {hand.queue[0][0]: hand for hand in self._hands if hand.queue}
            wait = None if end is None else max(0.0, end - time.monotonic())
            if self._pool.open():
                wait = LOOK if wait is None else min(LOOK, wait)
            done = first_of(list(heads), wait)
            if done is None and end is not None and time.monotonic() >= end:
                return None
            if done is not None:
                hand = heads[done]
                if hand.starting is None or self._pool.started(hand):
                    return hand
            self._pool.look()

    def _collect(self, hand: Hand, schedule: Schedule) -> list[Message]:
        """The replies to a worker's first job; none yet if it died and the job is tried again."""
        reference, job = hand.queue[0]
        try:
            parcel, seconds = self._finish(hand, ray.get(reference))
        except ray.exceptions.RayError as error:
            lost = [job for _, job in hand.queue]
            self._pool.replace(hand)
            return schedule.retry(lost, type(error).__name__)
        hand.queue.popleft()
        replies, contexts = unwrap(parcel)
        self.contexts.update({context.node_id: context for context in contexts})
        schedule.costs.learn(job.nodes, seconds, hand.number)
        return list(replies)

    def _finish(self, hand: Hand, found: Any) -> Any:  # Any: see Hand
        """What a worker's ``run`` returned."""
        if self.profiler is None:
            return found
        done, worked = found
        self.profiler.received(hand.queue[0][1].sent, worked)
        for _, job in list(hand.queue)[1:2]:
            job.sent = time.perf_counter()  # until now it waited behind the other
        return done

    def _give_up(self, schedule: Schedule, timeout: float | None) -> Iterator[Message]:
        """Error replies for everyone who is not done in time."""
        late = schedule.rest()
        for hand in list(self._hands):
            if hand.queue:
                late += [job for _, job in hand.queue]
                self._pool.replace(hand)
        for job in late:
            for message in job.messages:
                yield failed(message, f"no reply within {timeout:g} s")


def first_of(references: list[Any], wait: float | None) -> Any:  # Any: see Hand
    """The first of Ray's references that is there within ``wait`` seconds, or None."""
    if not references:
        time.sleep(wait or 0.0)
        return None
    done, _ = ray.wait(references, num_returns=1, timeout=wait)
    return done[0] if done else None
