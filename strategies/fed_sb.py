"""Fed-SB: only the small matrix R between fixed factors trains and travels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.errors import ConfigError
from fedlora.lowrank import mean_adapter
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.sums import MeanSums, Sums
from fedlora.wire import Layout
from strategies.base import LoraStrategy
from strategies.traits import Traits

CORE = re.compile(r"\.lora_R\.weight$")


@dataclass(kw_only=True)
class FedSb(LoraStrategy):
    """Fed-SB: averages R of the adapter ``lora_sb``, whose B and A never change; exact.

    Singhal, Ponkshe, Vartak, Varshney and Vepakomma, "Fed-SB: A Silver Bullet for Extreme
    Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", 2025,
    arXiv 2502.15436.

        R = sum_k p_k R_k,   so  sum_k p_k B R_k A = B R A

    Each way travel r^2 numbers per layer and client, whatever the layer's size, and the heads. It
    is FedAvg, but for refusing every other adapter, where the mean would not be exact.

    The paper finds B, A and the first R by the SVD of a step of full fine-tuning; its code takes
    the clients' data for that, without noise in private runs too. Here B and A come from the base
    or the seed, and R begins at 0: see ``fedlora.adapters.lora_sb``.
    """

    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(
        exact="yes", result="core", noise="linear", up=("r * r",), down=("r * r",)
    )

    def plan(self, server_round: int) -> LocalPlan:
        """All that the adapter trains."""
        return LocalPlan()

    def summed(self, server_round: int = 1) -> Sums:
        """The means."""
        return MeanSums()

    def check_layout(self, layout: Layout) -> None:
        """Only R and heads may train.

        Raises:
            ConfigError: another adapter than ``lora_sb``.
        """
        if layout.scales or not any(CORE.search(field.key) for field in layout.fields):
            trains = "factors A and B" if layout.scales else "no matrix R"
            raise ConfigError(
                f"method: FedSb averages R between fixed factors, and found an adapter with "
                f"{trains}, allowed: adapter.name = 'lora_sb'"
            )

    def merge(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """The mean of R and of the heads by examples."""
        mean = mean_adapter([update.adapter for update in updates], shares(updates))
        return GlobalState(mean, state.round + 1)
