"""Clients that are slow, away or lost, and the virtual clock that times them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedlora.options import Below1, CountOrZero, NonNegative, Part, Positive

OF_A_MODE = {"over_select": "rounds", "buffer": "fedbuff", "staleness_power": "fedbuff"}


class ClockConfig(Part):
    """How long clients would take and who would be lost, in virtual seconds.

    Nobody waits for a virtual second, and only clients whose replies count train.

    Attributes:
        mode: ``none`` has no such clock; ``rounds`` waits in every round for those who were asked;
            ``fedbuff`` merges whenever ``buffer`` updates have come, however old their start is.
        speeds: each client's seconds are multiplied by a factor of its own, drawn from the seed:
            1 with ``none``, between 1 and 1 + ``spread`` with ``uniform``, and with ``lognormal``
            exp of a normal number whose standard deviation is ``spread``.
        spread: see ``speeds``; 0.5 lets the slowest of 40 lognormal clients take 9 times as long
            as the fastest, or so.
        seconds_per_example: of one step; 0.05 is a phone with a model of 20 M numbers, or so.
        seconds_per_megabyte_down, seconds_per_megabyte_up: of 1e6 bytes; 8 and 2 Mbit/s.
        dropout: the chance that a client is lost on the way with what it was asked for, at a moment
            drawn evenly from the time it would take.
        availability: the share of each day for which a client is there, in one window a day that
            begins at a moment drawn from the seed; whoever is still at work at its end is lost.
        day: virtual seconds from one window to the next.
        deadline: virtual seconds after which a client is waited for no longer; 0 is none.
        over_select: ask so many times the clients that a round needs, rounded up, and take the
            first (``rounds``).
        buffer: K, the updates that are merged together (``fedbuff``).
        staleness_power: an update that began t merges ago moves the adapter by (1 + t)^-power of
            itself (``fedbuff``).
    """

    mode: Literal["none", "rounds", "fedbuff"] = "none"
    speeds: Literal["none", "uniform", "lognormal"] = "none"
    spread: NonNegative = 0.5
    seconds_per_example: NonNegative = 0.05
    seconds_per_megabyte_down: NonNegative = 1.0
    seconds_per_megabyte_up: NonNegative = 4.0
    dropout: Below1 = 0.0
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    day: Positive = 86400.0
    deadline: NonNegative = 0.0
    over_select: Annotated[float, Field(ge=1, le=100)] = 1.0
    buffer: CountOrZero = 0
    staleness_power: NonNegative = 0.5

    @model_validator(mode="after")
    def _of_the_mode(self) -> Self:
        for name, field in type(self).model_fields.items():
            if name == "mode" or getattr(self, name) == field.default:
                continue
            if self.mode == "none":
                raise ValueError(f'mode = "rounds" or "fedbuff" with {name}')
            if self.mode != OF_A_MODE.get(name, self.mode):
                raise ValueError(f'no {name} with mode = "{self.mode}"')
        if self.mode == "fedbuff" and not self.buffer:
            raise ValueError('buffer of 1 or more with mode = "fedbuff"')
        return self
