"""How workers are told to add up what their clients send, and what comes of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.errors import WireError, wrong
from fedlora.rounds import GlobalState, LocalPlan
from fedlora.sums import Sums, Tensors
from fedlora.sums_order import Limits, SumsOrder
from fedlora.wire import Layout


@dataclass(frozen=True)
class Totals:
    """Sums of many packs, added in the order of their clients.

    Attributes:
        packs: the clients of each pack that is in them.
        sums: by name.
        bytes_up: what the clients would have sent by themselves.
    """

    packs: tuple[tuple[int, ...], ...] = ()
    sums: Tensors | None = None
    bytes_up: int = 0

    def plus(self, pack: tuple[int, ...], sums: Tensors, bytes_up: int = 0) -> Totals:
        """With one more pack, the sums of which may be added to in place."""
        if self.sums is not None:
            for key, tensor in self.sums.items():
                tensor.add_(sums[key])
            sums = self.sums
        return Totals((*self.packs, pack), sums, self.bytes_up + bytes_up)


@runtime_checkable
class SummingGrid(Protocol):
    """A grid whose workers add up what their clients send."""

    def take_sums(self) -> Totals:
        """The totals of the replies that were received last; handed out once."""
        ...

    def sum_again(self, token: str, told: ArrayRecord) -> Totals:
        """A second pass over the updates that the workers still hold."""
        ...


@dataclass(frozen=True)
class Adding:
    """One round whose updates are added up by a grid's workers."""

    order: SumsOrder
    grid: SummingGrid

    @staticmethod
    def of(
        grid: object,
        sums: Sums | None,
        layout: Layout,
        plan: LocalPlan,
        server_round: int,
        weighted_by_key: str,
        limits: Limits,
    ) -> Adding:
        """With a token of its own."""
        token = secrets.token_hex(8)
        order = SumsOrder.of(token, sums, layout, plan, server_round, weighted_by_key, limits)
        return Adding(order, check_grid(grid))

    def merge(self, state: GlobalState, clients: Sequence[int]) -> tuple[GlobalState, int]:
        """The next state from what the workers added up, and the bytes that clients sent.

        Raises:
            WireError: the sums are not those of these clients, or a worker was lost with updates
                that a second pass needs.
        """
        totals = self.grid.take_sums()
        if sorted(client for pack in totals.packs for client in pack) != sorted(clients):
            raise WireError("the workers' sums are not of the clients that replied")
        sums = dict(totals.sums or {})
        told = self.order.sums.question(sums)
        if told:
            again = self.grid.sum_again(self.order.token, to_arrays(told))
            lost = sorted(client for pack in {*totals.packs} - {*again.packs} for client in pack)
            if lost:
                raise WireError(
                    "a worker was lost between the two passes, and with it the updates of clients "
                    f"{', '.join(map(str, lost))}"
                )
            sums |= again.sums or {}
        return self.order.sums.merged(state, sums), totals.bytes_up


def check_sums(
    rule: str, sums: Sums | None, private: bool, key: str = "sums", found: str = "workers"
) -> None:
    """Make sure that a rule can be merged from sums; ``key`` is what asked for them.

    Raises:
        ConfigError: it cannot.
    """
    if private:
        raise wrong(key, found, "'server': client-level privacy clips single updates")
    if sums is None:
        raise wrong(key, found, f"'server': {rule} with these options needs single updates")


def check_grid(grid: object) -> SummingGrid:
    """The grid, if its workers add up.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(grid, SummingGrid):
        raise wrong("sums", "workers", "'server' on Flower's own runtime, whose nodes send updates")
    return grid


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """Tensors as they travel, at their own width."""
    return ArrayRecord({key: Array(value.contiguous().numpy()) for key, value in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """And back."""
    return {key: torch.from_numpy(array.numpy().copy()) for key, array in arrays.items()}
