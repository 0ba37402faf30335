"""How private sums count, and how many clients they need."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from fedlora.options import Count, Part, Positive


class SecureConfig(Part):
    """Of ``launch.sums = "masked"``.

    Attributes:
        threshold: of the clients that a round asks, more than this share must last to its end, or
            the round is lost; two thirds at least (``fedlora/masks.py`` says what for).
        clip: the largest absolute value of a number that a client adds up; who has a larger one
            says so and is left out. Numbers are rounded to the nearest of 2^bits - 1 levels from
            -clip to clip, so a mean is off by half a level at most.
        bits: of a level. With all clients and examples in a sum it must fit into 64 bits; what fits
            into 32 travels as such.
        examples: the largest number of examples that a client may have.
    """

    threshold: Annotated[float, Field(ge=2 / 3, lt=1)] = 2 / 3
    clip: Positive = 16.0
    bits: Annotated[int, Field(ge=2, le=32)] = 32
    examples: Count = 2**20

    def needed(self, clients: int) -> int:
        """How many of so many clients must last."""
        return math.floor(self.threshold * clients + 1e-9) + 1
