"""What a strategy must remember to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord
from torch import Tensor

from fedlora import wire

if TYPE_CHECKING:
    from strategies.base import LoraStrategy

CARRIED = ("memory", "clock")  # a strategy's tensors by name that one round leaves to the next


@dataclass(frozen=True)
class Snapshot:
    """A strategy after a round.

    Attributes:
        round: how many rounds led to it.
        arrays: the adapter by wire key, in the wire's order and width.
        carried: tensors by name for each of ``CARRIED``.
        clients: the client's number by node, as far as nodes have told.
        bound: the clip that client-level privacy has come to; None without.
    """

    round: int
    arrays: Mapping[str, Tensor]
    carried: Mapping[str, Mapping[str, Tensor]]
    clients: Mapping[int, int]
    bound: float | None = None

    @staticmethod
    def of(strategy: LoraStrategy, server_round: int, arrays: ArrayRecord) -> Snapshot:
        """What ``on_round`` finds after a round."""
        privacy = strategy.client_privacy
        return Snapshot(
            server_round,
            wire.tensors(arrays),
            {name: dict(getattr(strategy, name)) for name in CARRIED},
            dict(strategy._clients),
            privacy.bound if privacy else None,
        )

    def restore(self, strategy: LoraStrategy) -> ArrayRecord:
        """Put all of it back into a strategy; returns the adapter to go on from."""
        for name in CARRIED:
            setattr(strategy, name, dict(self.carried[name]))
        strategy._clients = dict(self.clients)
        if strategy.client_privacy and self.bound is not None:
            strategy.client_privacy.bound = self.bound
        return wire.record(self.arrays)
