"""How many examples each client has, from whoever knows it, and whether its ledger is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clients.resident import Resident
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.records import configs_in, metrics_in
from simulations.grid import LocalGrid
from strategies.sampling import wait_for_nodes

WAIT = 600.0  # seconds for all nodes to connect, as ``Asking.node_timeout``


@dataclass(frozen=True)
class Census:
    """What the server knows of its clients before round 1.

    Attributes:
        counts: of each client's training examples; 0 where nobody has to tell.
        told: whether the clients told them.
        own_ledgers: whether ledgers are where the server cannot read them.
    """

    counts: Sequence[int]
    told: bool = False
    own_ledgers: bool = False


def census(config: RunConfig, here: Resident, grid: Grid) -> Census:
    """Counts from the rows themselves in a simulation of ours, else from those who have them.

    On Flower's own runtime clients are asked only if their examples are private: noise is planned
    for each one's number.

    Raises:
        DataError: a client's own rows cannot be read; in a simulation, all that is wrong is told.
        ConfigError: a client does not answer as it should.
    """
    if isinstance(grid, LocalGrid):
        return Census(counts_of(config, here))
    if config.privacy.unit != "example":
        dealt = here.own is None
        return Census([len(part) for part in here.parts] if dealt else [0] * len(here.parts))
    counts, own_ledgers = _asked(config, grid)
    if here.own is None:
        return Census([len(part) for part in here.parts], own_ledgers=own_ledgers)
    return Census(counts, True, own_ledgers)


def counts_of(config: RunConfig, here: Resident) -> list[int]:
    """Each client's training examples, all rows of clients' own being read.

    Raises:
        DataError: they cannot be; all that is wrong is told.
    """
    if here.own is not None:
        for client in range(config.clients.number):
            here.own.read(client)
    return [len(part) for part in here.parts]


def _asked(config: RunConfig, grid: Grid) -> tuple[list[int], bool]:
    """Each client's count, and whether any has a ledger of its own."""
    number = config.clients.number
    ask = {"config": ConfigRecord({"fedlora": config.client().model_dump_json()})}
    nodes = wait_for_nodes(grid, number, 0.0, WAIT)
    messages = [
        Message(RecordDict({**ask}), dst_node_id=node, message_type=MessageType.QUERY)
        for node in nodes
    ]
    counts, own_ledgers, reasons = dict[int, int](), False, list[str]()
    for reply in grid.send_and_receive(messages, timeout=config.clients.timeout):
        if reply.has_error():
            reasons.append(str(reply.error.reason))
            continue
        numbers: MetricRecord = next(iter(metrics_in(reply.content).values()), MetricRecord())
        words: ConfigRecord = next(iter(configs_in(reply.content).values()), ConfigRecord())
        client, count = words.get("client"), numbers.get("num-examples")
        if type(client) is int and type(count) is int and client not in counts and count > 0:
            counts[client] = count
            own_ledgers = own_ledgers or bool(words.get("own-ledger"))
    if missing := sorted(set(range(number)) - counts.keys()):
        named = ", ".join(map(str, missing))
        raise ConfigError(
            f"private training: client(s) {named} did not tell their number of examples, which "
            f"noise is planned from{': ' if reasons else ''}{'; '.join(sorted(reasons))}"
        )
    return [counts[client] for client in range(number)], own_ledgers
