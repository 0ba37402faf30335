"""What a node says of places of its own, its rows and its client's ledger, and tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from clients.own_rows import OwnRows, Place, holdings
from clients.partition_id import client_of, config_of
from fedlora.config import ClientConfig
from fedlora.errors import wrong
from fedlora.tasks import load_task

DATA, HELD_OUT, LEDGER = "data", "held-out", "ledger"  # keys of a SuperNode's --node-config


def heed(own: OwnRows | None, config: ClientConfig, contexts: Sequence[Context]) -> dict[int, Path]:
    """Let clients' own rows be read where their nodes say; the folders of ledgers that nodes name.

    Raises:
        ConfigError: a path that depends on where a process starts, or nodes of another federation.
    """
    ledgers = {}
    for context in contexts:
        client = client_of(context, config)
        if own is not None:
            own.found_at(client, Place(_named(context, DATA), _named(context, HELD_OUT)))
        if folder := _named(context, LEDGER):
            ledgers[client] = Path(folder)
    return ledgers


def counted(message: Message, context: Context) -> Message:
    """The answer to a query: how many examples a client trains on, and if its ledger is its own.

    No model is loaded.
    """
    config = config_of(cast(ConfigRecord, message.content["config"]))
    own, parts, _ = holdings(config, load_task(config.task))
    ledgers, client = heed(own, config, [context]), client_of(context, config)
    said = MetricRecord({"num-examples": len(parts[client])})
    whose = ConfigRecord({"client": client, "own-ledger": client in ledgers})
    return Message(RecordDict({"metrics": said, "reply": whose}), reply_to=message)


def _named(context: Context, key: str) -> str:
    """A path in the node's config; empty where it names none."""
    path = str(context.node_config.get(key, ""))
    if path and not Path(path).is_absolute():
        raise wrong(f"node config: {key}", path, "an absolute path")
    return path
