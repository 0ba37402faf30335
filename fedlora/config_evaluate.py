"""What clients measure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlora.options import Count, CountOrZero, Part


class EvaluateConfig(Part):
    """What clients measure of the task's held-out part, and on rows of their own beside it.

    Attributes:
        rows: which of the held-out rows a client measures: an equal ``share`` of all, or a share
            of those of the groups that it trains on (``own_groups``), which it divides with the
            other clients of a group. Where clients keep something, that is how good each is on its
            own groups; else it is the same. What is of no client's groups is not measured then.
        personal: whether they measure rows of their own. A share of each client's rows is then
            held back from training.
        holdout: that share, drawn from the seed: one row at least, and never all.
        fine_tune_steps: local steps from the global adapter, after which a client measures what is
            personal; they are thrown away. Where the rule keeps something with its clients, that is
            measured instead, without such steps.
        every: measure rows of their own after each round that this divides, round 0 too; 0 after
            the last one alone, which is measured always.
        held_out_every: measure held-out rows after each round that this divides; round 0 and the
            last one are measured always.
    """

    rows: Literal["share", "own_groups"] = "share"
    personal: bool = False
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    fine_tune_steps: CountOrZero = 10
    every: CountOrZero = 0
    held_out_every: Count = 1
