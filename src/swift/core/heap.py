"""How the C library keeps memory that tensors on the CPU have freed."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of large tensors instead of returning it to the kernel; whether it does now.

    By default a block of more than 32 MiB is mapped and unmapped every time, and the kernel fills its pages with
    zeros one page fault at a time: three quarters of the time of an elementwise operation on 48 MiB. The process
    then stays as large as it once was. Who has chosen an allocator (``MALLOC_*``, ``GLIBC_TUNABLES``,
    ``LD_PRELOAD``) keeps it; other C libraries are left alone.
    """
    chosen = any(
        value and (name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"))
        for name, value in os.environ.items()
    )
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all(mallopt(option, _LARGEST_INT) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
