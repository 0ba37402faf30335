"""What the private clients of a run, or its server, have spent."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.ledger import Ledger
from fedlora.privacy import PrivacyEvent, epsilon
from simulations.statement import ledger_folder


def spent(config: RunConfig, folder: Path) -> float | None:
    """Epsilon, at ``privacy.delta``, of the client that has spent most, or of the server.

    By Rényi's bound, which is quick and never too low, from the ledger of the run in ``folder``.
    None where nothing is private, or no client has charged anything that can be seen from here.

    Raises:
        PrivacyError: the ledger cannot be read.
    """
    if config.privacy.unit == "none":
        return None
    ledger = Ledger(ledger_folder(config, folder))
    owners: list[int | None] = [*ledger.clients()] if config.privacy.unit == "example" else [None]
    spendings = {tuple(ledger.events(owner)) for owner in owners}
    return max((_price(events, config.privacy.delta) for events in spendings), default=None)


@lru_cache(1000)
def _price(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    """Epsilon of what was charged."""
    return epsilon(events, delta, "rdp") if events else 0.0
