"""Memory that a process frees: kept for what the next round allocates, or given back."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for them, see mallopt(3)
KEPT, LARGEST = 2**31 - 1, 2**25  # bytes; both are the most that mallopt takes


def keep_heap() -> bool:
    """Let this process keep what it frees; False where the allocator is not glibc's.

    Adapters come and go with every round. Given back to the system, their pages are cleared and
    mapped anew each time, which took as long as all else that a round of large arrays does
    (``results/bench/payload``). A process that keeps them stays as large as it ever was.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))


def give_back_heap() -> None:
    """Give the system what this process has freed, as far as the allocator can (glibc's can).

    Who measures what some work takes does this first: the work would find its memory there.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError):  # another allocator; TypeError: Windows
        return
    malloc_trim(0)
