"""The round loop that every aggregation rule shares, as a Flower ``Strategy``."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from logging import INFO
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.errors import ConfigError, FedloraError, WireError
from fedlora.lowrank import aggregation_error
from fedlora.options import Count, CountOrZero, NonNegative, Share, checked_options
from fedlora.rounds import (
    FACTORS,
    ClientUpdate,
    Factor,
    Failure,
    GlobalState,
    LocalPlan,
    RoundRecord,
    shares,
)
from fedlora.wire import Layout, fingerprint, size
from strategies.record import Trace
from strategies.replies import as_updates, collect, mean_metrics
from strategies.sampling import draw, wait_for_nodes

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


@dataclass(kw_only=True)
class LoraStrategy(Strategy):
    """What all rules have in common; a rule adds ``plan`` and ``merge``.

    The first ten fields are those of Flower's ``FedAvg`` and mean the same, but for two things:
    a round is merged only while ``min_train_nodes`` good replies remain, and replies are
    checked one by one, so that a bad one costs itself alone.

    Attributes:
        seed: of the draw of clients, which does not depend on the order of node ids' arrival.
        node_timeout: seconds to wait for ``min_available_nodes`` before giving up.
        settle: seconds without a new node before the first round is planned, so that it does
            not train only the few that registered first. 0 plans at once.
        scales: ``alpha / r`` by layer key, for adapters whose layers differ in it.
    """

    fraction_train: Share = 1.0
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
    scales: Mapping[str, float] | None = None
    _trace: Trace = field(default_factory=Trace, init=False, repr=False)
    _state: GlobalState | None = field(default=None, init=False, repr=False)
    _layout: Layout | None = field(default=None, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    _clients: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every field against its type.

        Raises:
            ConfigError: a value of the wrong type or out of range.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        checked_options(type(self), given, type(self).__name__)

    @abstractmethod
    def plan(self, server_round: int) -> LocalPlan:
        """What clients train in this round, and what travels to them."""

    @abstractmethod
    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The next state from checked updates in client order; pure."""

    def summary(self) -> None:
        """Log the rule and its options."""
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        log(INFO, "\t└──> %s(%s)", type(self).__name__, shown)

    def prepare(self, arrays: ArrayRecord) -> Layout:
        """The layout of these arrays; ``start`` calls it before anything is sent.

        Raises:
            WireError: arrays that cannot be averaged.
            ConfigError: the rule freezes a factor, and the adapter has none.
        """
        if self._layout is None or set(arrays) != {f.key for f in self._layout.fields}:
            self._layout = Layout.of(arrays, self.scales)
        train = self.plan(1).train
        if set(train) != set(FACTORS) and not self._layout.scales:
            raise ConfigError(
                f"method: {type(self).__name__} trains factor {' and '.join(train)} alone, and "
                "this adapter has no factors A and B; allowed: adapter 'lora'"
            )
        return self._layout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the planned factors for the clients drawn for this round."""
        if self.fraction_train == 0.0:
            return []
        nodes = self._draw(grid, server_round, self.fraction_train, self.min_train_nodes)
        layout, plan = self.prepare(arrays), self.plan(server_round)
        self._state = GlobalState(layout.unpack(arrays), server_round - 1)
        record = ConfigRecord(dict(config))
        record["train"] = "".join(plan.train)
        kept: list[Factor] = [factor for factor in FACTORS if factor not in plan.send]
        record["kept"] = "".join(kept)
        record["kept-fingerprint"] = fingerprint(self._state.adapter, kept) if kept else ""
        payload = layout.pack(self._state.adapter, plan.send)
        self._trace.bytes_down += size(payload) * len(nodes)
        return self._messages("train", server_round, payload, record, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, merge and measure; ``(None, None)`` keeps the old adapter."""
        received, asked = list(replies), self._trace.asked
        if not received and not asked:
            return None, None
        if self._state is None or self._layout is None:
            raise FedloraError("aggregate_train was called before configure_train")
        found = collect(received, asked, "train", server_round, self.weighted_by_key)
        self._clients.update({reply.node: reply.client for reply in found.good})
        self._trace.bytes_up += found.bytes_up
        self._trace.failures += found.failures
        updates, good, refused = as_updates(
            found.good, self._layout, self.plan(server_round), self._state.adapter
        )
        self._trace.failures += refused
        if len(updates) < (needed := max(self.min_train_nodes, 1)):
            return self._keep(f"{len(updates)} good replies, {needed} needed (min_train_nodes)")
        state = self.merge(self._state, updates)
        merged = self._layout.pack(state.adapter)
        try:
            self._layout.unpack(merged)
        except WireError as error:
            return self._keep(f"what was merged is no adapter: {error}")
        self._trace.aggregation_error = aggregation_error(
            [update.adapter for update in updates], shares(updates), state.adapter
        )
        self._trace.clients = tuple(update.client for update in updates)
        if self.train_metrics_aggr_fn:
            contents = [reply.content for reply in good]
            return merged, self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return merged, mean_metrics(good)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The whole adapter to the drawn clients, each told which share of the test is its."""
        if self.fraction_evaluate == 0.0:
            self._trace.asked = {}
            return []
        nodes = self._draw(grid, server_round, self.fraction_evaluate, self.min_evaluate_nodes)
        return self._messages("evaluate", server_round, arrays, ConfigRecord(dict(config)), nodes)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Metrics averaged by examples."""
        asked = self._trace.asked
        found = collect(replies, asked, "evaluate", server_round, self.weighted_by_key)
        self._trace.failures += found.failures
        if not found.good:
            return None
        if self.evaluate_metrics_aggr_fn:
            contents = [reply.content for reply in found.good]
            return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)
        return mean_metrics(found.good)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        evaluate_first: bool = False,
        on_round: Callable[[RoundRecord, ArrayRecord], None] | None = None,
    ) -> Result:
        """Flower's round loop, with a record of every round.

        Args:
            grid: see Flower's ``Strategy.start``, as for all that is not named here.
            initial_arrays: the adapter to start from, by PEFT's state-dict keys.
            num_rounds: of training.
            timeout: seconds to wait for the replies of one stage.
            train_config: sent with each training message.
            evaluate_config: sent with each evaluation message.
            evaluate_fn: central evaluation, called with round 0 as well.
            evaluate_first: let clients evaluate the initial adapter too, as round 0.
            on_round: called with each round's record and the adapter after it.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        self._layout, self._clients = None, {}
        self.prepare(initial_arrays)
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        for server_round in range(num_rounds + 1):
            started = time.monotonic()
            self._trace = Trace()
            trained = evaluated = central = None
            if server_round:
                config = ConfigRecord(dict(train_config or {}))
                messages = self.configure_train(server_round, arrays, config, grid)
                replies = grid.send_and_receive(messages, timeout=timeout)
                merged, trained = self.aggregate_train(server_round, replies)
                arrays = result.arrays = merged or arrays
            if trained is not None:
                result.train_metrics_clientapp[server_round] = trained
            if server_round or evaluate_first:
                config = ConfigRecord(dict(evaluate_config or {}))
                messages = self.configure_evaluate(server_round, arrays, config, grid)
                replies = grid.send_and_receive(messages, timeout=timeout)
                evaluated = self.aggregate_evaluate(server_round, replies)
            if evaluated is not None:
                result.evaluate_metrics_clientapp[server_round] = evaluated
            if evaluate_fn and (central := evaluate_fn(server_round, arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = central
            seconds = time.monotonic() - started
            record = self._trace.record(server_round, trained, central or evaluated, seconds)
            log(INFO, "[ROUND %s/%s] %s", server_round, num_rounds, record)
            if on_round:
                on_round(record, arrays)
        return result

    def _keep(self, reason: str) -> tuple[None, None]:
        """Note why this round leaves the adapter as it was."""
        note = Failure(None, "round", f"{reason}: the adapter stays as it was")
        self._trace.failures.append(note)
        return None, None

    def _messages(
        self,
        stage: Literal["train", "evaluate"],
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Sequence[int],
    ) -> list[Message]:
        """One message per node; Flower's ``server-round`` and a share of the work in each."""
        self._trace.asked = {node: self._clients.get(node, node) for node in nodes}
        config["server-round"] = server_round
        config["shards"] = len(nodes)
        return [
            Message(
                content=RecordDict(
                    {
                        self.arrayrecord_key: arrays,
                        self.configrecord_key: ConfigRecord({**config, "shard": shard}),
                    }
                ),
                message_type=MessageType.TRAIN if stage == "train" else MessageType.EVALUATE,
                dst_node_id=node,
                group_id=str(server_round),
            )
            for shard, node in enumerate(nodes)
        ]

    def _draw(self, grid: Grid, server_round: int, fraction: float, least: int) -> list[int]:
        """Wait for the nodes, in the first round until no more come, then draw this round's."""
        settle, self._settled = 0.0 if self._settled else self.settle, True
        needed = max(self.min_available_nodes, least)
        nodes = wait_for_nodes(grid, needed, settle, self.node_timeout)
        return draw(nodes, fraction, least, self.seed, server_round)
