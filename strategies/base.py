"""The round loop that every aggregation rule shares, as a Flower ``Strategy``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from logging import INFO
from typing import ClassVar, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedlora.config_secure import SecureConfig
from fedlora.errors import ConfigError, FedloraError, PrivacyError, WireError
from fedlora.faults import reach
from fedlora.options import Share, checked_options
from fedlora.records import arrays_in
from fedlora.rounds import (
    FACTORS,
    ClientUpdate,
    Failure,
    GlobalState,
    LocalPlan,
    RoundRecord,
)
from fedlora.sums import Sums
from fedlora.sums_order import Limits
from fedlora.wire import Layout, Ranks, size
from strategies.adding import Adding, check_grid, check_sums
from strategies.asking import Asking
from strategies.client_privacy import ClientPrivacy
from strategies.loop import run_rounds
from strategies.masked_round import check_masked
from strategies.merging import next_state
from strategies.messages import asked_of, to_measure
from strategies.private_round import check_linear, what_is_sent
from strategies.rank_policy import UNSAID, RankPolicy
from strategies.replies import collect, mean_metrics
from strategies.sent_base import sent_base
from strategies.server_optimizers import check_server
from strategies.snapshot import Snapshot
from strategies.traits import Traits
from strategies.virtual_time import ask


@dataclass(kw_only=True)
class LoraStrategy(Asking):
    """What all rules have in common; a rule adds ``plan`` and ``merge``.

    The fields that Flower's ``FedAvg`` has as well mean the same, but a round is merged only while
    ``min_train_nodes`` good replies remain, and a bad reply costs itself alone. See ``Asking`` for
    those that are not named here.

    Attributes:
        fraction_train: share of the nodes that train in a round.
        scales: ``alpha / r`` by layer key, for adapters whose layers differ in it.
        client_privacy: draws the clients and makes their updates one private mean, which the
            rule then merges like any other update. ``fraction_train``, ``min_train_nodes`` and
            the clients' weights count for nothing then: each would tell who took part.
        sums: ``workers``: clients' updates are checked and added up where they were trained, and
            the aggregation error, which takes single updates, is not measured. ``masked``: not even
            then is one seen by the server, see ``fedlora/masks.py``; only ``start`` can do that.
        secure: how masked sums count, and how many clients they need.
        ranks: whether clients may be of lower ranks than the adapter; see ``Layout``.
        memory: that of the last ``GlobalState``.
    """

    linear: ClassVar[bool] = False  # whether merging a mean is the mean of merging
    averages: ClassVar[bool] = False  # whether merging is the mean of each tensor that trained
    by_examples: ClassVar[bool] = True  # whether a client counts by its examples, or all the same
    traits: ClassVar[Traits | None] = None  # what it says of itself; None says nothing
    changes_base: ClassVar[bool] = False  # whether it adds to the frozen weights, through memory
    mixed_ranks: ClassVar[RankPolicy] = UNSAID  # how the rule takes clients of several ranks

    fraction_train: Share = 1.0
    scales: Mapping[str, float] | None = None
    client_privacy: ClientPrivacy | None = None
    sums: Literal["server", "workers", "masked"] = "server"
    secure: SecureConfig = field(default_factory=SecureConfig)
    ranks: Ranks = "one"
    memory: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _state: GlobalState | None = field(default=None, init=False, repr=False)
    _layout: Layout | None = field(default=None, init=False, repr=False)
    _adding: Adding | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every field against its type.

        Raises:
            ConfigError: a value of the wrong type or out of range, or that does not fit the rule.
            PrivacyError: client-level privacy for a rule that is not linear in the updates.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        checked_options(type(self), given, type(self).__name__)
        check_server(type(self).__name__, self.averages, self)
        if self.ranks != "one":
            self.mixed_ranks.check(type(self).__name__, "ranks", self.ranks)
        if self.client_privacy:
            check_linear(type(self).__name__, self.linear)
        if self.sums == "workers":
            check_sums(type(self).__name__, self.summed(), bool(self.client_privacy))
        if self.sums == "masked":
            check_masked(type(self).__name__, self.summed(), bool(self.client_privacy))

    @abstractmethod
    def plan(self, server_round: int) -> LocalPlan:
        """What clients train in this round, and what travels to them."""

    @abstractmethod
    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The next state from checked updates in client order; pure."""

    def summed(self, server_round: int = 1) -> Sums | None:
        """A round's merge from sums over clients; None for a rule that needs every update."""
        return None

    def check_layout(self, layout: Layout) -> None:
        """Refuse, by a ``ConfigError``, an adapter that the rule is not for."""

    def added_rank(self, clients: int, rank: int) -> int:
        """The rank of what merging so many updates of a rank adds to the frozen weights."""
        return 0

    def base_record(self) -> ArrayRecord:
        """What was added to the frozen weights, as it travels in every message."""
        return sent_base(self.memory, self._layout) if self._layout else ArrayRecord()

    def summary(self) -> None:
        """Log the rule and its options."""
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        log(INFO, "\t└──> %s(%s)", type(self).__name__, shown)

    def prepare(self, arrays: ArrayRecord) -> Layout:
        """The layout of these arrays; ``start`` calls it before anything is sent.

        Raises:
            WireError: arrays that cannot be averaged.
            ConfigError: the rule freezes a factor, or adds products to the base, and the adapter
                has no factors; or it has other wishes, see ``check_layout``.
        """
        if self._layout is None or set(arrays) != {f.key for f in self._layout.fields}:
            self._layout = Layout.of(arrays, self.scales, self.ranks)
        plan, needs = self.plan(1), ""
        if plan.by_step or plan.personal or set(plan.train) != set(FACTORS):
            needs = "trains or sends one factor at a time"
        elif self.changes_base:
            needs = "adds products of factors to the base"
        if needs and not self._layout.scales:
            raise ConfigError(
                f"method: {type(self).__name__} {needs}, and this adapter has no factors A and B; "
                "allowed: adapter 'lora'"
            )
        self.check_layout(self._layout)
        return self._layout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the planned factors for the clients drawn for this round."""
        self._state = self._adding = None
        if self.fraction_train == 0.0:
            return []
        nodes = self._connected(grid, self.min_train_nodes)
        reach("before-sampling")
        try:
            nodes = self._drawn(nodes, server_round, arrays, config)
        except PrivacyError as error:
            self._keep(str(error))
            return []
        reach("after-sampling")
        layout, plan = self.prepare(arrays), self.plan(server_round)
        self._state = GlobalState(layout.unpack(arrays), server_round - 1, self.memory)
        record = asked_of(plan, self._state.adapter, config)
        self.trace.adapter = str(record["adapter"])
        if self.sums == "workers":
            key, limits = self.weighted_by_key, self._limits()
            self._adding = Adding.of(
                grid, self.summed(server_round), layout, plan, server_round, key, limits
            )
            record["sums"] = self._adding.order.text()
        payload = layout.pack(self._state.adapter, plan.send, plan.personal)
        messages = self.addressed_to("train", server_round, payload, record, nodes)
        for message in messages[:1]:  # the others carry the same
            each = sum(map(size, arrays_in(message.content).values()))
            self.trace.bytes_down += each * len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, merge and measure; ``(None, None)`` keeps the old adapter."""
        received, asked = list(replies), self.trace.asked
        if self.sums == "masked" and received:
            raise FedloraError("aggregate_train: found sums 'masked', which start alone can do")
        if self._state is None or self._layout is None:
            if not received:
                return None, None
            raise FedloraError("aggregate_train was called before configure_train")
        key, limits = self.weighted_by_key, self._limits()
        found = collect(received, asked, "train", server_round, key, limits)
        self._clients.update({reply.node: reply.client for reply in found.good})
        self.trace.bytes_up += found.bytes_up
        self.trace.failures += found.failures
        try:
            state, merged, good = next_state(
                self, server_round, self._state, self._layout, found.good, self._adding
            )
        except (PrivacyError, WireError) as error:
            return self._keep(str(error))
        self.memory = state.memory
        self.trace.merged = True
        self.trace.clients = tuple(reply.client for reply in good)
        if self.train_metrics_aggr_fn:
            contents = [reply.content for reply in good]
            return merged, self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return merged, mean_metrics(good)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See ``Asking``; each client puts in what is personal."""
        told = to_measure(self.plan(max(server_round, 1)), arrays, config)
        return super().configure_evaluate(server_round, *told, grid)

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
        resume: Snapshot | None = None,
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
            resume: go on after its round, from its adapter; the result has the later rounds alone.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        self._layout, self._clients, self.memory, self.clock = None, {}, {}, {}
        if resume:
            initial_arrays = resume.restore(self)
        if self.sums == "workers":
            check_grid(grid)
        self.prepare(initial_arrays)
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            ConfigRecord(dict(train_config or {})),
            ConfigRecord(dict(evaluate_config or {})),
            evaluate_fn,
            evaluate_first,
            on_round or (lambda record, arrays: None),
            resume.round + 1 if resume else 0,
        )

    def _keep(self, reason: str) -> tuple[None, None]:
        """Note why this round leaves the adapter as it was."""
        note = Failure(None, "round", f"{reason}: the adapter stays as it was")
        self.trace.failures.append(note)
        return None, None

    def _limits(self) -> Limits:
        """What the replies of this round's training must keep to."""
        return Limits(self.max_examples, self.max_norm, self.trace.adapter, self.trace.base)

    def _drawn(
        self, nodes: list[int], server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[int]:
        """Those of the nodes that train in a round."""
        if self.client_privacy:
            sent = what_is_sent(arrays, config)
            return self.client_privacy.draw(nodes, server_round, sent)
        return ask(self, nodes, server_round)
