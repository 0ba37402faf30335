"""The workers of a grid: on which nodes they are, and what becomes of those that are lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count

import ray

from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError, FedloraError
from simulations.installed import compared, installed
from simulations.ray_cluster import cores
from simulations.ray_nodes import Node, alive, choose, wanted
from simulations.ray_worker import Hand, Needs, Report, start_worker

NOTHING = Needs()
LOOK = 2.0  # seconds from one look at a cluster that may have grown to the next
TRIES = 3  # workers that may die as they start on a node where none has started yet


class Pool:
    """Long-lived workers, as many as were asked for and the nodes have room for.

    On a cluster workers come with nodes and go with them. A node that cannot run one, since it
    lacks the task's data or has another Fedlora, is named once and left out.

    Attributes:
        hands: the workers' ends here; those that are starting too.
    """

    def __init__(
        self,
        app: str,
        launch: LaunchConfig,
        clients: int,
        grows: bool = False,
        needs: Needs = NOTHING,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Start the workers.

        Args:
            app: ``module:attribute`` of the client app.
            launch: how many there may be, what each reserves, where.
            clients: how many, the most workers on a cluster for which ``launch`` names no number.
            grows: whether nodes may join.
            needs: what each loads as it starts.
            tell: told what a person should know of the nodes.

        Raises:
            ConfigError: not all have room; or not one, on a cluster joined by its address.
        """
        self.hands: list[Hand] = []
        self._app, self._launch, self._needs, self._tell = app, launch, needs, tell
        self._grows = grows
        self._unfit: dict[str, str] = {}  # why a node is left out, by its id
        self._failed: Counter[str] = Counter()  # starts that failed, by node
        self._worked: set[str] = set()  # nodes where one has started
        self._told: set[str] = set()
        nodes = alive(launch)
        self._most = launch.workers or clients
        if not (launch.workers or launch.address):
            self._most = max(1, min(cores(launch), sum(node.room for node in nodes)))
        self._check_room(nodes, 1 if launch.address else self._most)
        self._fill(nodes)
        if launch.workers > len(self.hands):
            tell(
                f"launch.workers: {len(self.hands)} of {launch.workers} have room now; more start "
                "where nodes join"
            )

    def open(self) -> bool:
        """Whether more workers may come."""
        return self._grows and len(self.hands) < self._most

    def look(self) -> None:
        """Start workers where nodes have room for more, if more may come.

        Raises:
            FedloraError: there is no worker left, and no node that could run one.
        """
        if self.open() and time.monotonic() >= self._looked + LOOK:
            self._fill(alive(self._launch))
        if not self.hands:
            self._check_fit()

    def started(self, hand: Hand) -> bool:
        """Hear what a worker that was starting says; False if it is gone, and another may start.

        A worker that cannot do its work is ended, and its node left out. One that died as it
        started may have been killed; only if that happens again and again where none has ever
        started, the node is taken to be the cause.
        """
        reference, hand.starting = hand.starting, None
        node = hand.node.id
        try:
            report: Report = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._failed[node] += 1
            broken = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
            if broken or (node not in self._worked and self._failed[node] >= TRIES):
                self._leave_out(hand.node, _last_line(error))
            self.replace(hand)
            return False
        differs, refused = compared(installed(), report.installed)
        if problem := report.problem or refused:
            self._leave_out(hand.node, problem)
            self.replace(hand)
            return False
        self._worked.add(node)
        if differs:
            self._tell_once(f"node {hand.node.name}: {differs}")
        return True

    def replace(self, hand: Hand) -> None:
        """A fresh worker in the place of one that died or must stop, wherever there is room.

        Its jobs are gone. If no node has room, it has no successor until one has.
        """
        ray.kill(hand.actor)
        hand.queue.clear()
        hand.holds = None
        others = [other for other in self.hands if other is not hand]
        node = self._choose(alive(self._launch), others)
        if node is None:
            self.hands = others
            self._tell_once(f"node {hand.node.name}: its worker is gone, no other node has room")
        else:
            self._start(hand, node)

    def close(self) -> None:
        """End all workers."""
        for hand in self.hands:
            ray.kill(hand.actor)
        self.hands.clear()

    def _fill(self, nodes: list[Node]) -> None:
        """Start workers until there are enough, or no room."""
        self._looked = time.monotonic()
        while len(self.hands) < self._most:
            node = self._choose(nodes, self.hands)
            if node is None:
                return
            numbers = {hand.number for hand in self.hands}
            hand = Hand(next(n for n in count() if n not in numbers), node)
            self._start(hand, node)
            self.hands.append(hand)
            nodes = [replace(n, free=n.free - 1) if n is node else n for n in nodes]

    def _start(self, hand: Hand, node: Node) -> None:
        """Start a worker on a node; it gets jobs once it has said that it can do them."""
        hand.node = node
        hand.actor = start_worker(self._app, self._launch, node.id, self._needs)
        hand.starting = hand.actor.report.remote()

    def _choose(self, nodes: list[Node], hands: list[Hand]) -> Node | None:
        """The node for one more worker beside those."""
        ours = Counter(hand.node.id for hand in hands)
        return choose(
            nodes,
            lambda node: ours[node.id],
            self._launch.placement,
            lambda node: node.id not in self._unfit,
        )

    def _leave_out(self, node: Node, reason: str) -> None:
        """Start nothing on a node any more."""
        self._unfit[node.id] = f"node {node.name}: {reason}"
        self._tell_once(f"{self._unfit[node.id]}; it is left out")

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell(text)

    def _check_room(self, nodes: list[Node], needed: int) -> None:
        """Make sure that workers fit, rather than wait for ever for one that cannot."""
        wants = wanted(self._launch)
        have: Mapping[str, float] = ray.cluster_resources()
        for name, each in wants.items():
            if each * needed > have.get(name, 0.0) + 1e-6:
                raise ConfigError(
                    f"launch.workers: found {needed} workers of {each:g} {name} each, allowed: "
                    f"what the cluster has, {have.get(name, 0.0):g} {name}"
                )
        if (fits := sum(node.room for node in nodes)) < needed:
            each_has = ", ".join(f"{node.name} {node.room}" for node in nodes)
            kinds = ", ".join(f"{each:g} {name}" for name, each in wants.items())
            raise ConfigError(
                f"launch.workers: found {needed} workers of {kinds} each, allowed: at most {fits}, "
                f"as many as the nodes hold ({each_has})"
            )

    def _check_fit(self) -> None:
        """Refuse to wait for nodes that are all left out, or that cannot come."""
        able = [node for node in alive(self._launch) if node.room]
        if not self._grows or (able and all(node.id in self._unfit for node in able)):
            reasons = sorted(self._unfit[node.id] for node in able if node.id in self._unfit)
            raise FedloraError(f"no worker can run: {'; '.join(reasons) or 'no node has room'}")


def _last_line(error: Exception) -> str:
    """What went wrong in a worker that could not start: the end of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"a worker cannot start there: {lines[-1] if lines else type(error).__name__}"
