"""Rows from numbers that two functions in turn cannot give: memory, and other processes' times."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.errors import ConfigError
from simulations.bench_pairs import Row
from simulations.heap import give_back_heap

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def row(
    case: str,
    ours: Sequence[float],
    peer: Sequence[float],
    unit: str,
    allowed: float | None = None,
) -> Row:
    """A row from pairs of numbers measured elsewhere, by no processor's clock."""
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    middle = statistics.median(ratios)
    return Row(
        case=case,
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ratio=middle,
        allowed=allowed,
        unit=unit,
        pairs=len(ratios),
        clock="wall",
        least=min(ratios),
        greatest=max(ratios),
        ratio_wall=middle,
        ratio_cpu=middle,
    )


def extra_megabytes(work: Callable[[], object]) -> float:
    """What this process held at most while it worked, beyond what it held before.

    What earlier work left unused in the allocator is given back first.

    Raises:
        ConfigError: the system does not tell.
    """
    if not CLEAR.exists():
        raise ConfigError(f"bench: found {sys.platform}, allowed: Linux, to measure memory")
    gc.collect()
    give_back_heap()
    CLEAR.write_text("5")  # the highest value starts again from here
    before = _megabytes("VmRSS")
    work()
    return _megabytes("VmHWM") - before


def _megabytes(field: str) -> float:
    """One line of this process' status."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ConfigError(f"bench: found no {field} in {STATUS}, allowed: a kernel that tells")
