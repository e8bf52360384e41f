"""Memory that tensors have freed stays with the process, unless its user has chosen an allocator."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")

FAULTS = """
import resource, statistics, torch
from swift.core.heap import keep_freed_memory
kept = keep_freed_memory()
x = torch.ones(12 * 2**20)  # 48 MiB: more than glibc keeps of itself
faults = []
for step in range(31):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
    del y
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, int(statistics.median(faults)))
"""


@pytest.mark.parametrize(("chosen", "is_kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_memory_is_used_again(chosen, is_kept):
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**free, "LD_PRELOAD": "", **chosen},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kept, faults = process.stdout.split()
    assert kept == str(is_kept)
    # Now and then a block moves on to fresh pages, so the median of the steps is what counts: 12,288 pages of
    # 4 KiB, or 24 of 2 MiB, where memory goes back to the kernel.
    assert (int(faults) < 10) == is_kept
