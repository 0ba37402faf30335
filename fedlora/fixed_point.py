"""Numbers as integers that are added up without rounding and without a wrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from fedlora.errors import WireError, wrong

Words = NDArray[numpy.unsignedinteger]  # of 32 or 64 bits: integers modulo 2^32 or 2^64


@dataclass(frozen=True)
class FixedPoint:
    """Levels ``-largest, ..., largest``, ``step`` apart, times whole weights, modulo a power of 2.

    The nearest level to x in [-clip, clip] is off by ``step / 2`` at most, and so is a weighted
    mean of levels. A sum of ``clients`` of them, each times a weight of at most ``examples``, is
    below half the modulus in absolute value, so it is known from its remainder.

    Attributes:
        clip, bits, examples: see ``SecureConfig``.
        clients: that are added up, at most.

    Raises:
        ConfigError: such sums do not fit into 64 bits.
    """

    clip: float
    bits: int
    examples: int
    clients: int

    def __post_init__(self) -> None:
        """Make sure that no sum can wrap."""
        if not (0 < self.clip < float("inf") and 2 <= self.bits <= 32):
            raise wrong("secure", (self.clip, self.bits), "a finite clip and 2 to 32 bits")
        if min(self.examples, self.clients) < 1:
            raise wrong("secure", (self.examples, self.clients), "at least one example and client")
        if self._reach >= 2**63:
            fits = (2**63 - 1) // (self.largest * self.clients)
            allowed = f"at most {fits} with {self.clients} clients and {self.bits} bits, so that "
            raise wrong("secure.examples", self.examples, f"{allowed}sums fit into 64 bits")

    @property
    def largest(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def step(self) -> float:
        """From one level to the next."""
        return self.clip / self.largest

    @property
    def dtype(self) -> str:
        """Of words that hold a sum: ``uint32`` if they can, else ``uint64``."""
        return "uint32" if self._reach < 2**31 else "uint64"

    @property
    def _reach(self) -> int:
        """What no sum's absolute value is above."""
        return self.largest * self.examples * self.clients

    def levels(self, values: NDArray[numpy.float64], name: str) -> NDArray[numpy.int64]:
        """The nearest levels.

        Raises:
            WireError: a value, of ``name``, beyond the clip or not finite.
        """
        largest = float(numpy.max(numpy.abs(values), initial=0.0))
        if not largest <= self.clip:
            raise WireError(
                f"{name!r} holds a value of {largest:.3g}, allowed: at most {self.clip:g} "
                "(secure.clip)"
            )
        return numpy.rint(values / self.clip * self.largest).astype(numpy.int64)

    def words(self, levels: NDArray[numpy.int64], weight: int) -> Words:
        """Levels times a client's weight, as remainders."""
        return (levels * weight).astype(f"i{numpy.dtype(self.dtype).itemsize}").view(self.dtype)

    def whole(self, total: Words) -> NDArray[numpy.int64]:
        """The integers whose remainders were added up."""
        return total.view(f"i{total.dtype.itemsize}").astype(numpy.int64)


def clear_sums(
    vectors: Sequence[Sequence[float]], weights: Sequence[int], fixed: FixedPoint
) -> list[int]:
    """``sum_k n_k level(x_k)`` of each coordinate by plain loops: the reference for masked sums."""
    totals = [0] * len(vectors[0])
    for values, weight in zip(vectors, weights, strict=True):
        for place, value in enumerate(values):
            totals[place] += weight * round(value / fixed.clip * fixed.largest)
    return totals
