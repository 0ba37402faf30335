"""Freed memory is kept, its pages stay mapped; who measures memory has it given back first."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

LOOK = """
import resource, sys
from simulations.heap import keep_heap
if sys.argv[1] == "kept":
    assert keep_heap()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def round():
    return [b"x" * 2**19 for _ in range(64)]
round()
before = faults()
round()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_second_round_finds_its_pages_mapped() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", LOOK, how], capture_output=True, text=True)
        return int(done.stdout)

    pages = 64 * 2**19 // resource.getpagesize()
    assert faults("given back") > pages / 2 > 100 > faults("kept")


MEASURE = """
import torch
from simulations.heap import keep_heap
from simulations.memory import Peak
assert keep_heap()
blocks = [b"x" * 2**20 for _ in range(128)]
del blocks
peak = Peak(private=False)
numbers = torch.ones(20_000_000)
print(peak.found(workers=1, gpu=False).worker)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_memory_is_measured_right_where_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert 75e6 < int(done.stdout) < 120e6
