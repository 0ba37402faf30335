"""Flower grids of our own: the same server and client apps, without Flower's runtime."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.records import configs_in
from simulations.progress import Progress, Stage
from simulations.summing import Fold, Reducer
from strategies.adding import Totals, to_tensors

if TYPE_CHECKING:
    from simulations.profiling import Profiler

SERVER_NODE = 2**62  # so that node ids can be the clients' own numbers
RUN_ID = 1


class LocalGrid(Grid):
    """What grids without a SuperLink share: client k is node k, replies come in client order.

    Attributes:
        contexts: each client's Flower context; its ``state`` lasts from message to message.
        progress: told of stages and replies.
        profiler: told of the time that workers took; None unless a run is profiled.
    """

    profiler: Profiler | None = None

    def __init__(
        self,
        clients: int,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Give every client a context and this process an identity in Flower's eyes."""
        identify()
        self._run = Run.create_empty(RUN_ID)
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._totals = Totals()
        self.progress = progress or Progress()
        self.contexts = {
            client: Context(
                run_id=RUN_ID,
                node_id=client,
                node_config={"partition-id": client, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for client in range(clients)
        }

    @abstractmethod
    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        """Run the messages on their clients; replies as they come, errors as error replies."""

    @abstractmethod
    def sum_again(self, token: str, told: ArrayRecord) -> Totals:
        """See ``strategies.adding.SummingGrid``."""

    def take_sums(self) -> Totals:
        """See ``strategies.adding.SummingGrid``."""
        totals, self._totals = self._totals, Totals()
        return totals

    def forget(self) -> None:
        """Empty every client's state: what one run left there is nothing to the next."""
        for context in self.contexts.values():
            context.state = RecordDict()

    def close(self) -> None:
        """Release what the grid holds; nothing, unless a subclass says so."""

    def ready(self) -> None:
        """Wait until clients can be run; they can at once, unless a subclass says otherwise."""

    def workers(self) -> int:
        """How many clients, or packs of them, run at once."""
        return 1

    def set_run(self, run: Run) -> None:
        """Set the run; Flower's own apps call this."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The clients' numbers: they are always connected."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages now and keep the replies for ``pull_messages``."""
        sent = [self._stamp(message) for message in messages]
        for reply in self.deliver(sent, None):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to pushed messages, each handed out once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the messages and return their replies in client order."""
        replies = list(self.stream(messages, timeout=timeout))
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Run the messages while their replies are taken, in the order in which they come.

        Whoever drops each reply before the next never holds all of a round. Clients of replies
        that are not taken may never run.
        """
        sent = [self._stamp(message) for message in messages]
        told = bool(sent) and not sent[0].metadata.message_type.startswith("query")
        if told:
            first = sent[0].metadata
            number = int(first.group_id) if first.group_id.isdigit() else 0
            stage: Stage = "train" if first.message_type == "train" else "evaluate"
            self.progress.stage_started(number, stage, len(sent))
        fold = Fold(message.metadata.dst_node_id for message in sent)
        for reply in self.deliver(sent, timeout):
            fold.take(reply)
            if told:
                self.progress.replied(reply.has_error())
            yield reply
            del reply
        self._totals = fold.totals

    def _stamp(self, message: Message) -> Message:
        """Give a message the id that Flower's SuperLink would give it."""
        self._sent += 1
        message.metadata.__dict__["_message_id"] = f"{RUN_ID}-{self._sent}"
        return message


class InProcessGrid(LocalGrid):
    """Calls the client app in this process, one client after the other: to debug and to test."""

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Hold the app; see ``LocalGrid``."""
        super().__init__(clients, run_config, progress)
        self._app, self._reducer = client_app, Reducer()

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
        """One client at a time; ``timeout`` cannot interrupt a client and is ignored."""
        for pack in packs(messages):
            contexts = [self.contexts[message.metadata.dst_node_id] for message in pack]
            yield from self._reducer.answers(self._app, pack, contexts)

    def sum_again(self, token: str, told: ArrayRecord) -> Totals:
        """Pack after pack."""
        totals = Totals()
        for pack in self._reducer.held(token):
            totals = totals.plus(pack, to_tensors(self._reducer.again(pack, told)))
        return totals


def packs(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Messages in groups to be trained together, formed in node order from what they ask.

    A training message may ask for a number in ``pack``; who runs a pack, and how many do so at
    once, has no part in it.
    """
    ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    size = min((_pack_size(message) for message in ordered), default=1)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _pack_size(message: Message) -> int:
    """How many clients the message allows in a pack."""
    if message.metadata.message_type != "train":
        return 1
    asked = [record.get("pack", 1) for record in configs_in(message.content).values()]
    return max([1, *(size for size in asked if isinstance(size, int))])


def identify() -> None:
    """Set Flower's process-wide identity, without which no message can be made.

    Flower sets it in its own runtimes; it is private there, so it is set here alone, and a test
    holds us to it.
    """
    TaskIdentity.task_id = 0
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE
