"""A run's privacy, from what its recipe asks for: each client's noise, and the server's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clients.resident import Resident
from fedlora.calibration import ClientPlan
from fedlora.config import RunConfig
from fedlora.ledger import Ledger
from simulations.packing import trained_in
from simulations.statement import plan_run
from strategies import LoraStrategy
from strategies.client_privacy import AdaptiveClip, ClientPrivacy
from strategies.private_round import check_linear


def plan_privacy(
    config: RunConfig, here: Resident, strategy: LoraStrategy, counts: Sequence[int]
) -> list[ClientPlan]:
    """Every client's noise, after a look at whether this can be trained privately at all.

    ``counts``: each client's examples.

    Raises:
        PrivacyError: it cannot, or the target cannot be had.
    """
    if config.privacy.unit == "none":
        return []
    if config.privacy.unit == "client":
        check_linear(type(strategy).__name__, strategy.linear)
    else:
        from clients.supported import check_supported  # Opacus takes seconds to import

        moving = here.moving(trained_in(config, strategy))
        check_supported(here.model.module, list(moving.values()))
    return plan_run(config, counts)


def protected(
    strategy: LoraStrategy, config: RunConfig, planned: list[ClientPlan], ledger: Ledger | None
) -> LoraStrategy:
    """The strategy with client-level privacy, where the recipe asks for it."""
    if config.privacy.unit != "client":
        return strategy
    return replace(strategy, client_privacy=on_server(config, planned[0], ledger))


def on_server(
    config: RunConfig, planned: ClientPlan, ledger: Ledger | None = None
) -> ClientPrivacy:
    """What the server does to protect whole clients, as the recipe says."""
    privacy = config.privacy
    adaptive = AdaptiveClip(privacy.quantile, privacy.clip_rate) if privacy.adaptive_clip else None
    return ClientPrivacy(
        noise_multiplier=planned.noise_multiplier,
        clip=privacy.clip,
        clients=config.clients.number,
        fraction=config.clients.fraction_train,
        sampling=privacy.sampling,
        adaptive=adaptive,
        seed=config.seed,
        rng=privacy.rng,
        ledger=ledger,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
    )
