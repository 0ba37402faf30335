"""What the server and the clients know of each other: the types of one round."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from fedlora.lowrank import Adapter

Factor = Literal["A", "B"]
FACTORS: tuple[Factor, ...] = ("A", "B")
Piece = Literal["A", "B", "heads"]  # a factor of all pairs, or all that is no factor
PIECES: tuple[Piece, ...] = ("A", "B", "heads")
FACTOR_KEY = re.compile(
    r"^(?P<layer>.*\.lora_(?:embedding_)?)(?P<factor>[AB])(?P<end>(\.weight)?)$"
)
GLOBAL, PERSONAL = "global", "personal"  # what clients measure on rows of their own
MASKED = "masked"  # the record and the node's setting that speak of masked sums
INPUTS = "masked-inputs"  # a masked reply's metric, in the place of its examples: always 1
HALVED = "halved-to"  # a reply's metric: clients that trained together, for lack of memory


@dataclass(frozen=True)
class LocalPlan:
    """What a method asks of its clients in one round.

    Attributes:
        train: the factors that clients train and upload; the others are frozen before the
            optimiser is built. Heads and other vectors always train.
        send: the factors that travel to clients. A factor left out must be one that every
            client can draw by itself; its fingerprint is sent instead.
        by_step: let local steps take turns, B first; see ``TrainConfig``.
        smooth: filter the gradients of local steps; see ``TrainConfig``.
        personal: what stays with each client, which trains it and keeps it from round to round; at
            first it is what everybody draws from the seed. It travels neither way, whatever
            ``train`` and ``send`` say.
        gamma: a client of rank r whose units beyond ``gamma r`` shrank in local training cuts its
            rank to that, from then on; 1 is never.
        penalty: times the norms of these units' A and B, is added to the local loss.
    """

    train: tuple[Factor, ...] = FACTORS
    send: tuple[Factor, ...] = FACTORS
    by_step: bool = False
    smooth: bool = False
    personal: tuple[Piece, ...] = ()
    gamma: float = 1.0
    penalty: float = 0.0


@dataclass(frozen=True)
class ClientUpdate:
    """One client's checked reply to a training message.

    Attributes:
        client: the client's number, from 0 (Flower's node id for clients that do not say).
        adapter: what it trained, frozen factors filled in from the global adapter.
        examples: its weight, positive and finite.
        metrics: what else it measured.
    """

    client: int
    adapter: Adapter
    examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalState:
    """All that the server needs to go on after ``round`` rounds.

    Attributes:
        adapter: what is trained.
        round: how many rounds led to it.
        memory: a rule's own tensors by name, float64 where they accumulate. What ``merge`` returns
            here it finds in the next round; a round that keeps the adapter keeps the memory.
    """

    adapter: Adapter
    round: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)


def piece_of(key: str) -> Piece:
    """What the tensor under a wire key is a part of."""
    match = FACTOR_KEY.match(key)
    return "heads" if match is None else "A" if match["factor"] == "A" else "B"


def ever_trained(plans: Iterable[LocalPlan]) -> tuple[Factor, ...]:
    """The factors that some of the plans train."""
    found = {factor for plan in plans for factor in plan.train}
    return tuple(factor for factor in FACTORS if factor in found)


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    """``p_k = n_k / sum_j n_j``."""
    largest = max(update.examples for update in updates)
    parts = [update.examples / largest for update in updates]  # no sum of counts can overflow
    return [part / sum(parts) for part in parts]


@dataclass(frozen=True)
class Failure:
    """A client, or a whole round, that did not count, and why."""

    client: int | None
    stage: Literal["train", "evaluate", "round"]
    reason: str


@dataclass(frozen=True)
class OverClients:
    """A number over clients, each of which counts the same.

    Attributes:
        worst: the mean over the worst tenth of them, their number rounded up.
        spread: the standard deviation over these clients, all there are (division by n).
    """

    mean: float
    worst: float
    spread: float


@dataclass(frozen=True)
class OwnRows:
    """What clients measured on rows of their own that never trained."""

    clients: int
    loss: OverClients
    accuracy: OverClients


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``.

    Attributes:
        round: 0 for the adapter before any training, then 1, 2, ...
        merged: whether a new adapter came of this round.
        train_loss: mean training loss over the merged clients, by their examples.
        loss, accuracy: of the global adapter after the round, over all held-out examples.
        perplexity: of language models, ``exp`` of the mean loss over all held-out tokens, each
            counting the same (``loss`` is a mean over texts); else None.
        groups: accuracy per group (for example per domain), of language models of tokens.
        perplexities: perplexity per group; empty where there is none.
        aggregation_error: see ``lowrank.aggregation_error``.
        aggregation_error_by_layer: that of each adapted layer alone, which combine to it as
            ``lowrank.relative_error`` says; empty where there is no ``aggregation_error``.
        bytes_up, bytes_down: numbers in the training messages times their width, as sent.
        seconds: wall time of the round, evaluation included.
        clients: the clients whose updates were merged.
        failures: everybody who was asked and did not count.
        clip: L2 norm to which whole updates were clipped, with client-level privacy.
        halved: clients whose pack did not fit into memory, and how many trained together instead.
        own_rows: by what was measured: ``global`` and ``personal`` of the clients that may train,
            ``new global`` and ``new personal`` of the newcomers; empty where nothing was.
        virtual_seconds: of the virtual clock, from the beginning to the end of this round; None
            without one.
        staleness_mean, staleness_max: of the updates that were merged from a buffer, how many
            merges ago they began; None elsewhere.
    """

    round: int
    merged: bool = False
    train_loss: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    groups: Mapping[str, float] = field(default_factory=dict)
    perplexities: Mapping[str, float] = field(default_factory=dict)
    aggregation_error: float | None = None
    aggregation_error_by_layer: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    clients: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()
    clip: float | None = None
    halved: Mapping[int, int] = field(default_factory=dict)
    own_rows: Mapping[str, OwnRows] = field(default_factory=dict)
    virtual_seconds: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None

    def as_json(self) -> dict[str, Any]:  # Any: JSON values of several kinds
        """A plain dictionary in field order."""
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> RoundRecord:  # Any: see as_json
        """The record whose line this is.

        Raises:
            TypeError, KeyError: it is no record.
        """
        return RoundRecord(
            **{
                **found,
                "clients": tuple(found["clients"]),
                "failures": tuple(Failure(**failure) for failure in found["failures"]),
                "halved": {int(client): size for client, size in found["halved"].items()},
            }
        )
