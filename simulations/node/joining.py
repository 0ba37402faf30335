"""A Ray that only this machine reaches, for a node's trainer, and joining it.

Ray reads its settings while it is imported, so nothing here imports it before they are made.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from fedlora.errors import ConfigError, FedloraError, wrong
from simulations.node.named import Named
from simulations.stopping import still_hearing

NAMESPACE = "fedlora-node"
LOOPBACK = "127.0.0.1"
KNOCK = 5.0  # seconds for a port to open
TRIES = "2"  # of Ray to join, half a minute each where somebody listens who is not Ray


def start(cpus: int, gpus: int, token: str) -> str:
    """Start a Ray that listens on the loopback alone, to those who have the token; its address.

    Raises:
        FedloraError: it cannot start, or would listen to other machines.
    """
    _settings(token)
    _init(
        "node",
        address="local",  # not one that somebody else started on this machine
        namespace=NAMESPACE,
        include_dashboard=False,
        num_cpus=cpus,
        num_gpus=gpus,
        _system_config={"free_objects_period_milliseconds": 0},  # not once a second
    )
    address = here()
    if not address.startswith(f"{LOOPBACK}:"):
        leave()
        raise FedloraError(f"node: Ray listens at {address}, allowed: {LOOPBACK} alone")
    return address


def join(named: Named, where: str) -> None:
    """Become a driver of the Ray that a trainer is in; ``where`` is named in what goes wrong.

    Raises:
        ConfigError: nobody answers there, or this process may not join.
    """
    _knock(named.address, where)
    _settings(named.token)
    _init(where, address=named.address, namespace=named.namespace)


@contextmanager
def joined(named: Named, where: str) -> Iterator[Any]:  # Any: Ray's handles have no static type
    """The trainer, while this process is in its Ray.

    Raises:
        ConfigError: see ``join``, or there is no such trainer.
    """
    join(named, where)
    try:
        yield trainer(named, where)
    finally:
        leave()


def trainer(named: Named, where: str) -> Any:  # Any: see ``joined``
    """The handle of a trainer in the Ray that this process is in.

    Raises:
        ConfigError: there is no such trainer.
    """
    import ray

    try:
        return ray.get_actor(named.name, namespace=named.namespace)
    except ValueError:
        allowed = f"the name of a trainer in the Ray at {named.address}; start 'fedlora node' again"
        raise wrong(where, named.name, allowed) from None


def here() -> str:
    """The address of the Ray that this process is in."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def resources() -> Mapping[str, float]:
    """What the Ray that this process is in has on this machine, used or not."""
    import ray

    this = ray.get_runtime_context().get_node_id()
    (found,) = [node["Resources"] for node in ray.nodes() if node["NodeID"] == this]
    return cast(Mapping[str, float], found)


def leave() -> None:
    """Leave Ray, which ends it if it was started here."""
    import ray

    with still_hearing():
        ray.shutdown()


def _settings(token: str) -> None:
    """What Ray is to read when it is imported; without a token, only what the user has set.

    Ray binds to all interfaces unless the node's address is 127.0.0.1, which on Linux it takes for
    itself only where clusters are off.

    Raises:
        FedloraError: it is imported, and has read others.
    """
    if token and "ray" in sys.modules and os.environ.get("RAY_AUTH_TOKEN") != token:
        raise FedloraError("node: this process has imported Ray, which reads its token but once")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", TRIES)
    if token:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = token


def _init(where: str, **settings: Any) -> None:  # Any: as ray.init declares them
    """Call ``ray.init`` without its noise.

    Raises:
        ConfigError: whatever Ray says against it, in one line.
    """
    import ray
    from ray._private import worker as driver

    try:
        with warnings.catch_warnings(), still_hearing():
            warnings.simplefilter("ignore")
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    except SystemExit:  # how Ray answers SIGTERM while it starts
        signal.raise_signal(signal.SIGTERM)
        raise
    except Exception as error:  # Ray raises bare ones
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: no Ray at {settings['address']}: {reason}") from None
    driver._worker_logs_enabled = False  # it would tell stdout of dead workers


def _knock(address: str, where: str) -> None:
    """Find out in seconds whether somebody listens; Ray itself would try for many minutes.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise wrong(where, address, "the host:port of a Ray, or the file of one")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{where}: nobody answers at {address} ({reason}), allowed: the address of a running "
            "Ray; start 'fedlora node' again"
        ) from None
