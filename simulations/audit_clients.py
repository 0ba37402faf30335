"""Canaries in the place of whole clients, through the server's own clip, sum and noise."""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
from numpy.typing import NDArray

from fedlora.calibration import ClientPlan
from fedlora.config import RunConfig
from fedlora.privacy import PrivacyEvent
from fedlora.seeds import numpy_generator
from simulations.protection import on_server
from strategies.client_privacy import ClientPrivacy

MOST = 2000  # canaries; each has a direction, so a release costs their number squared
LENGTH = 100.0  # clips: what a canary sends
NUMBERS = 25_000  # of noise in a release
RELEASES = 4
SILENT = 1e-9  # noise on the sum over the clip, where only the draws are looked at

Numbers = NDArray[numpy.float64]


def server_canaries(
    config: RunConfig, planned: ClientPlan, most: int = MOST
) -> tuple[Numbers, Numbers, NDArray[numpy.bool_], PrivacyEvent]:
    """Scores with noise and without, in clips, ``[m]``; who was there; and what was done.

    Canary i changes the adapter along a direction of its own, far longer than the clip; its
    score is its coordinate of all releases together. There are more canaries than clients, at
    the same rate and noise. Of an adaptive clip each round counts in the clip it used.
    """
    there = numpy_generator(config.seed, "canaries", "coins").random(most) < 0.5
    server = replace(on_server(config, planned), clients=most, ledger=None, epsilon=None)
    quiet = replace(server, noise_multiplier=SILENT, adaptive=None)
    scores, counts = (_scores(one, there, config.rounds) for one in (server, quiet))
    event = PrivacyEvent(server.planned() / most, server.sum_noise(), config.rounds)
    return scores, counts, there, event


def server_noise(config: RunConfig, planned: ClientPlan) -> Numbers:
    """Released noise over what is claimed for it, ``[releases, d]``."""
    server = replace(on_server(config, planned), ledger=None, epsilon=None)
    start = {"direction": torch.zeros(NUMBERS, dtype=torch.float64)}
    found = []
    for server_round in range(1, RELEASES + 1):
        claimed = server.sum_noise() * server.bound / server.planned()
        found.append(server.release(server_round, start, [])["direction"].numpy() / claimed)
    return numpy.stack(found)


def _scores(server: ClientPrivacy, there: NDArray[numpy.bool_], rounds: int) -> Numbers:
    """Each canary's coordinate of the sum of all releases, in clips."""
    start = {"direction": torch.zeros(len(there), dtype=torch.float64)}
    total = numpy.zeros(len(there))
    for server_round in range(1, rounds + 1):
        bound, uploads = server.bound, []
        for canary in server.draw(range(len(there)), server_round):
            if there[canary]:
                upload = torch.zeros(len(there), dtype=torch.float64)
                upload[canary] = LENGTH * bound
                uploads.append({"direction": upload})
        found = server.release(server_round, start, uploads)["direction"]
        total += found.numpy() * server.planned() / bound
    return total
