"""What is noted down while a round runs, and the record made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from flwr.app import MetricRecord

from fedlora.rounds import Failure, OwnRows, RoundRecord
from strategies.replies import by_group

LARGEST = 700.0  # whose exp is still a float


@dataclass
class Trace:
    """One round's notes: who was asked, what was sent, what went wrong.

    ``adapter`` is the fingerprint of what was sent to those who train, and ``base`` the digest of
    what was added to the frozen weights, as it was sent last. ``wanted`` is how many replies the
    round needs, and ``staleness`` of each merged update how many merges ago it began.
    """

    asked: Mapping[int, int] = field(default_factory=dict)
    adapter: str = ""
    base: str = ""
    clients: tuple[int, ...] = ()
    merged: bool = False
    clip: float | None = None
    halved: Mapping[int, int] = field(default_factory=dict)
    own_rows: Mapping[str, OwnRows] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    aggregation_error: float | None = None
    aggregation_error_by_layer: Mapping[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    wanted: int = 0
    virtual_seconds: float | None = None
    staleness: tuple[int, ...] = ()

    def record(
        self,
        server_round: int,
        trained: MetricRecord | None,
        measured: MetricRecord | None,
        seconds: float,
    ) -> RoundRecord:
        """The round as one line of ``rounds.jsonl``."""
        train, measure = _scalars(trained), _scalars(measured)
        return RoundRecord(
            round=server_round,
            merged=self.merged,
            train_loss=train.get("train_loss"),
            loss=measure.get("loss"),
            accuracy=measure.get("accuracy"),
            perplexity=_perplexity(measure.get("nats"), measure.get("tokens")),
            groups=by_group(measure, "accuracy"),
            perplexities=_perplexities(measure),
            aggregation_error=self.aggregation_error,
            aggregation_error_by_layer=self.aggregation_error_by_layer,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            seconds=seconds,
            clients=self.clients,
            failures=tuple(self.failures),
            clip=self.clip,
            halved=self.halved,
            own_rows=self.own_rows,
            virtual_seconds=self.virtual_seconds,
            staleness_mean=fmean(self.staleness) if self.staleness else None,
            staleness_max=max(self.staleness, default=None),
        )


def _perplexities(measure: Mapping[str, float]) -> dict[str, float]:
    """The perplexity of each group that has one."""
    nats, tokens = by_group(measure, "nats"), by_group(measure, "tokens")
    found = {name: _perplexity(nats[name], tokens.get(name)) for name in nats}
    return {name: value for name, value in found.items() if value is not None}


def _perplexity(nats: float | None, tokens: float | None) -> float | None:
    """``exp(nats / tokens)``; None where nothing was measured, or it is too large for a float."""
    if nats is None or not tokens or nats / tokens > LARGEST:
        return None
    return math.exp(nats / tokens)


def _scalars(record: MetricRecord | None) -> dict[str, float]:
    """The scalar metrics of a record, or none."""
    return {k: float(v) for k, v in (record or {}).items() if not isinstance(v, list)}
