"""Whom a stage asks and where, and the stage that measures: what training needs as well."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlora.options import Bound, Count, CountOrZero, NonNegative, Share
from fedlora.sums_order import Limits
from fedlora.wire import digest
from strategies.messages import Stage, addressed
from strategies.own_rows import Measuring
from strategies.record import Trace
from strategies.replies import collect, mean_metrics
from strategies.sampling import draw, wait_for_nodes
from strategies.server_optimizers import ServerOptions
from strategies.world import World

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


@dataclass(kw_only=True)
class Asking(ServerOptions, Strategy):
    """The nodes that a stage asks, and evaluation on them.

    The first nine fields are those of Flower's ``FedAvg`` and mean the same.

    Attributes:
        seed: of the draw of clients, which does not depend on the order of node ids' arrival.
        node_timeout: seconds to wait for ``min_available_nodes`` before giving up.
        settle: seconds without a new node before the first round is planned, so that it does
            not train only the few that registered first. 0 plans at once.
        max_examples: the largest ``weighted_by_key`` of a good reply. Nobody has trained an adapter
            on 1e9 examples, and a client that says so would be all that counts.
        max_norm: the largest L2 norm of all that a client sends together. That of an adapter which
            learns is below 1e3; the default leaves room and keeps products of factors finite.
        evaluate_every: clients measure held-out rows after each round that this divides, and after
            rounds 0 and the last; other rounds' records have no loss and no accuracy.
        own_rows: when clients measure on rows of their own, and which of them never train.
        world: clients on a virtual clock; see ``World``.
        clock: the clock's time, and of FedBuff what is on its way; see ``virtual_time.py``.
        trace: notes of the round that runs.
        server: see ``ServerOptions``, as for its other fields.
    """

    fraction_evaluate: Share = 1.0
    min_train_nodes: CountOrZero = 2
    min_evaluate_nodes: CountOrZero = 2
    min_available_nodes: Count = 2
    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"
    train_metrics_aggr_fn: MetricsFunction | None = None
    evaluate_metrics_aggr_fn: MetricsFunction | None = None
    seed: CountOrZero = 0
    node_timeout: NonNegative = 600.0
    settle: NonNegative = 2.0
    max_examples: Bound = 1e9
    max_norm: Bound = 1e6
    evaluate_every: Count = 1
    own_rows: Measuring | None = None
    world: World | None = None
    clock: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    trace: Trace = field(default_factory=Trace, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    _clients: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def base_record(self) -> ArrayRecord:
        """What was added to the frozen weights, as it travels in every message."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The whole adapter to the drawn clients, each told which share of the test is its."""
        if self.fraction_evaluate == 0.0:
            self.trace.asked = {}
            return []
        least = self.min_evaluate_nodes
        nodes = self._connected(grid, least)
        nodes = draw(nodes, self.fraction_evaluate, least, self.seed, server_round)
        return self.addressed_to(
            "evaluate", server_round, arrays, ConfigRecord(dict(config)), nodes
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Metrics averaged by examples."""
        asked = self.trace.asked
        limits = Limits(self.max_examples, base=self.trace.base)
        found = collect(replies, asked, "evaluate", server_round, self.weighted_by_key, limits)
        self.trace.failures += found.failures
        if not found.good:
            return None
        if self.evaluate_metrics_aggr_fn:
            contents = [reply.content for reply in found.good]
            return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)
        return mean_metrics(found.good)

    def addressed_to(
        self,
        stage: Stage,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Sequence[int],
    ) -> list[Message]:
        """One message per node, noted down as asked."""
        self.trace.asked = {node: self._clients.get(node, node) for node in nodes}
        keys, base = (self.arrayrecord_key, self.configrecord_key), self.base_record()
        self.trace.base = digest(base) if base else ""
        return addressed(stage, server_round, keys, arrays, base, config, nodes)

    def _connected(self, grid: Grid, least: int) -> list[int]:
        """The nodes but for newcomers, waited for; in the first round until no more come."""
        settle, self._settled = 0.0 if self._settled else self.settle, True
        needed = max(self.min_available_nodes, least)
        nodes = wait_for_nodes(grid, needed, settle, self.node_timeout)
        return nodes[: len(nodes) - self.own_rows.newcomers] if self.own_rows else nodes
