"""How much memory a worker needs: as measured in this process, or by formula."""

from __future__ import annotations

import contextlib
import importlib
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedlora.config import RunConfig
from simulations.heap import give_back_heap

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        worker: the most that one held, above what its imports take.
        imports: what they take in each process, some of it shared between processes.
        all_workers: both, times the workers.
        gpu: the most that one worker's tensors took on the GPU; 0 without one.
        measured: whether it was measured here; else it is weights, gradients and optimiser, and
            the pictures of a task whose sizes are declared.
    """

    worker: int
    imports: int
    all_workers: int
    gpu: int
    measured: bool


class Peak:
    """Watches this process from here on."""

    def __init__(self, private: bool) -> None:
        """``private``: import what private training needs first."""
        if private:
            importlib.import_module("clients.private")
        give_back_heap()
        with contextlib.suppress(OSError):  # forget an earlier peak, where the system can
            Path("/proc/self/clear_refs").write_text("5")
        self._before, self._began = resident_bytes("VmRSS"), time.perf_counter()

    def seconds(self) -> float:
        """Since it began to watch."""
        return time.perf_counter() - self._began

    def found(self, workers: int, gpu: bool) -> Memory:
        """The most memory this process held since, and what so many would hold."""
        worker = max(0, resident_bytes("VmHWM") - self._before)
        on_gpu = torch.cuda.max_memory_allocated() if gpu else 0
        return Memory(worker, self._before, workers * (worker + self._before), on_gpu, True)


def by_formula(
    config: RunConfig, module: nn.Module, moving: Mapping[str, nn.Parameter], pack: int, data: int
) -> Memory:
    """Weights and data; for each client of a pack its tensors, their gradients, the optimiser's.

    Privately each row of a batch has gradients of its own. Activations come on top.
    """
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    own = sum(p.numel() * p.element_size() for p in moving.values())
    rows = config.train.batch_size if config.privacy.unit == "example" else 1
    moments = 2 if config.train.optimizer == "adamw" else 1
    worker = weights + data + pack * own * (1 + rows + moments)
    return Memory(worker, 0, worker * config.launch.processes(), 0, False)


def resident_bytes(key: str) -> int:
    """Of this process, ``VmRSS`` (now) or ``VmHWM`` (at most); elsewhere than on Linux at most."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
