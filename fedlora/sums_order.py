"""What whoever adds up clients' updates must know of a round, as text beside its messages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from fedlora.lowrank import Adapter, LoraPair
from fedlora.rounds import Factor, LocalPlan
from fedlora.sums import KINDS, Kind, Sums, known
from fedlora.wire import Arrays, Field, Layout, Ranks


@dataclass(frozen=True)
class Limits:
    """What a good reply keeps to.

    Attributes:
        examples: the largest weight.
        norm: the largest L2 norm of all that it sends.
        adapter: the fingerprint of what was sent to it; a reply may leave it out, but not name
            another.
        base: the digest of what was added to the frozen weights, if any was; a reply must name it.
    """

    examples: float = math.inf
    norm: float = math.inf
    adapter: str = ""
    base: str = ""


@dataclass(frozen=True)
class SumsOrder:
    """What whoever adds up must know; it travels as text beside the training message.

    Attributes:
        token: of this round of this run, so that no other's updates are added.
        sums: see ``Sums``.
        fields, scales: the layout of what clients send.
        train: the factors that they were to train.
        server_round, weighted_by_key, limits: see ``replies.collect``.
        ranks: see ``Layout``.
    """

    token: str
    sums: Kind
    fields: tuple[Field, ...]
    scales: Mapping[str, float]
    train: tuple[Factor, ...]
    server_round: int
    weighted_by_key: str
    limits: Limits
    ranks: Ranks = "one"

    @staticmethod
    def of(
        token: str,
        sums: Sums | None,
        layout: Layout,
        plan: LocalPlan,
        server_round: int,
        weighted_by_key: str,
        limits: Limits,
    ) -> SumsOrder:
        """Of a rule's sums in a round."""
        return SumsOrder(
            token,
            known(sums),
            layout.fields,
            layout.scales,
            plan.train,
            server_round,
            weighted_by_key,
            limits,
            layout.ranks,
        )

    def text(self) -> str:
        """As JSON."""
        kind = next(name for name, known in KINDS.items() if isinstance(self.sums, known))
        return json.dumps({**asdict(self), "kind": kind})

    @staticmethod
    def read(text: str) -> SumsOrder:
        """From JSON."""
        given = json.loads(text)
        given["sums"] = KINDS[given.pop("kind")](**given["sums"])
        fields = [{**field, "shape": tuple(field["shape"])} for field in given["fields"]]
        given["fields"] = tuple(Field(**field) for field in fields)
        given["limits"] = Limits(**given["limits"])
        return SumsOrder(**{**given, "train": tuple(given["train"])})

    @property
    def layout(self) -> Layout:
        """The layout of what clients send."""
        return Layout(self.fields, self.scales, self.ranks)

    @property
    def plan(self) -> LocalPlan:
        """What clients train."""
        return LocalPlan(train=self.train)

    def shared(self, arrays: Arrays) -> Adapter:
        """What was sent; zeros, which nobody may send, where a factor did not travel."""
        shapes = {(field.pair, field.factor): field.shape for field in self.fields}
        zero = torch.zeros(())
        pairs = {
            pair: LoraPair(zero.expand(shapes[pair, "A"]), zero.expand(shapes[pair, "B"]), scale)
            for pair, scale in self.scales.items()
        }
        return self.layout.unpack(arrays, Adapter(pairs))
