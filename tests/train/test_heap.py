"""Memory that tensors have freed stays with the process, unless its user has chosen an allocator."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")

FAULTS = """
import resource, torch
from swift.core.heap import keep_freed_memory
kept = keep_freed_memory()
x = torch.ones(12 * 2**20)  # 48 MiB: more than glibc keeps of itself
for step in range(20):
    if step == 15:  # an aligned block needs a little more room than it has left behind: the first ones move on
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
    del y
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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
    assert (int(faults) < 100) == is_kept  # 5 x 12,288 pages of 4 KiB otherwise (fewer where pages are huge)
