"""How many clients a run trains together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clients.pack_size import pack_size, width_of
from clients.packs import packable
from clients.resident import Resident
from clients.stacked import PackError
from fedlora.config import RunConfig
from fedlora.errors import wrong
from fedlora.rounds import Factor, ever_trained
from strategies import LoraStrategy

ASKED = "launch.pack asks for it"
PACKS = 4  # at least so many a round, so that as many workers have something to do


def clients_together(config: RunConfig, here: Resident, strategy: LoraStrategy) -> tuple[int, str]:
    """How many clients a pack holds, and why: as asked, or as suits the model and the round.

    Raises:
        ConfigError: packs were asked for, and this model's clients cannot be trained together.
    """
    asked, factors = config.launch.pack, trained_in(config, strategy)
    if asked == 1:
        return 1, ASKED
    if config.train.checkpointing:
        return 1, "train.checkpointing goes client by client"
    try:
        moving = packable(here, factors, 0)
    except PackError as error:
        if asked:
            raise wrong("launch.pack", asked, f"1 (or 0, which takes it): {error}") from None
        return 1, str(error)
    return suited(config, moving, here.device.type, here.model.fixed())


def trained_in(config: RunConfig, strategy: LoraStrategy) -> tuple[Factor, ...]:
    """The factors that train in some round of a run."""
    return ever_trained(strategy.plan(number) for number in range(1, config.rounds + 1))


def suited(
    config: RunConfig,
    moving: Mapping[str, nn.Parameter],
    device: str,
    fixed: Mapping[str, Tensor],
) -> tuple[int, str]:
    """As ``clients_together`` for a model that can be packed.

    ``moving``: what trains; ``fixed``: see ``AdaptedModel.fixed``.
    """
    if config.launch.pack:
        return config.launch.pack, ASKED
    clients = config.clients
    drawn = max(clients.min_train_nodes, int(clients.training * clients.fraction_train))
    suits = pack_size(
        batch_size=config.train.batch_size,
        tokens=config.model.max_length,
        width=width_of(fixed or moving),
        numbers=sum(value.numel() for value in moving.values()),
        private=config.privacy.unit == "example",
        device=device,
    )
    shared = max(1, drawn // PACKS)
    if suits <= shared:
        return suits, f"the model's shapes allow {suits}"
    return shared, f"{drawn} clients of a round make {PACKS} packs or more"
