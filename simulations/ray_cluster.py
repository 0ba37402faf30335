"""Starting Ray here, or joining a cluster that is there."""

from __future__ import annotations

import logging
import math
import signal
import socket
import warnings
from typing import Any

import ray
from ray._private import ray_constants as constants
from ray._private import worker as driver

from fedlora.config import LaunchConfig
from fedlora.errors import ConfigError, FedloraError, wrong
from simulations.stopping import still_hearing


def cores(launch: LaunchConfig) -> int:
    """How many workers this machine's cores hold, or as many as were asked for."""
    return launch.model_copy(update={"backend": "ray"}).processes()


def join_ray(launch: LaunchConfig) -> bool:
    """Start Ray here, or join ``launch.address``; False if this process was in one already.

    Raises:
        ConfigError: there is no cluster at the address.
        FedloraError: Ray cannot start here.
    """
    if ray.is_initialized():
        return False
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # under `uv run` it would copy this folder
    quiet: dict[str, Any] = {  # Any: keyword arguments of several types
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if launch.runtime_env:
        quiet["runtime_env"] = launch.runtime_env
    if launch.address:
        _knock(launch.address)
        quiet["address"] = launch.address
    else:
        quiet["address"] = "local"  # not one that somebody else started on this machine
        quiet["num_cpus"] = max(1, math.ceil(cores(launch) * launch.cpus()))
        quiet["_system_config"] = {"free_objects_period_milliseconds": 0}  # not once a second
    try:
        with warnings.catch_warnings(), still_hearing():
            warnings.simplefilter("ignore")
            ray.init(**quiet)
    except SystemExit:  # how Ray answers SIGTERM as it starts
        signal.raise_signal(signal.SIGTERM)
        raise
    except Exception as error:  # Ray raises bare ones, for instance when a node is slow to start
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if launch.address:
            raise ConfigError(
                f"launch.address: cannot join {launch.address!r}: {reason}; allowed: a cluster "
                "that this machine is a node of: ray start --address HOST:PORT --num-cpus 0"
            ) from None
        raise FedloraError(f"Ray cannot start: {error}") from error
    driver._worker_logs_enabled = False  # it would tell stdout, where results go, of dead workers
    return True


def _knock(address: str) -> None:
    """Find out in seconds whether somebody listens; Ray itself would try for minutes.

    Raises:
        ConfigError: nobody does.
    """
    if "://" in address:
        raise wrong(
            "launch.address",
            address,
            "HOST:PORT of the cluster's head, or auto, on a machine that is one of its nodes",
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and the like: Ray knows at once
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"launch.address: cannot join {address!r}: {reason}; allowed: the address that "
            "'ray start --head' printed"
        ) from None
