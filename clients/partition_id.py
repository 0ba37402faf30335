"""Which client a Flower node is, in which run, and whether it may train."""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context

from fedlora.config import ClientConfig
from fedlora.errors import ConfigError, WireError


def config_of(ask: ConfigRecord) -> ClientConfig:
    """The configuration of the run that a message belongs to.

    Raises:
        WireError: it carries none.
    """
    text = ask.get("fedlora")
    if not isinstance(text, str):
        raise WireError("the message has no 'fedlora' entry; is the server a Fedlora server?")
    return ClientConfig.model_validate_json(text)


def client_of(context: Context, config: ClientConfig) -> int:
    """Which partition this node holds."""
    number = int(cast(int, context.node_config["partition-id"]))
    nodes = int(cast(int, context.node_config.get("num-partitions", config.clients.number)))
    if nodes != config.clients.number:
        raise ConfigError(
            f"clients.number is {config.clients.number} and the federation has {nodes} nodes; "
            "make them equal"
        )
    return number


def trainee(context: Context, config: ClientConfig) -> int:
    """As ``client_of``, of a node that may train.

    Raises:
        ConfigError: it is a newcomer, which must not.
    """
    client = client_of(context, config)
    if client >= config.clients.training:
        raise ConfigError(
            f"client {client} was asked to train, allowed: 0 to {config.clients.training - 1}; the "
            f"last {config.clients.newcomers} never do (clients.newcomers)"
        )
    return client
