"""Why a run failed, in one word that programs can act on: ``failure`` in ``status.json``."""

from __future__ import annotations

import errno
import os
from typing import Literal

import torch

from swift.core.errors import ConfigError, DataError, ModelError, SwiftError, TransientError, UsageError

__all__ = ["FailureKind", "NonFiniteError", "failure_kind"]

FailureKind = Literal["out_of_memory", "nonfinite", "data", "config", "disk", "refused", "crash"]

_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


class NonFiniteError(SwiftError):
    """The loss or its gradient became infinite or not a number."""


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of a run's last error; causes behind it count (a checkpoint that met a full disk).

    ``refused``: explained, and the next attempt would say the same.
    """
    seen: BaseException | None = error
    may_pass = False
    while seen is not None:
        kind = _kind(seen)
        if kind is not None:
            return kind
        may_pass |= isinstance(seen, TransientError) or (
            isinstance(seen, OSError) and not isinstance(seen, _STAYS)
        )
        seen = seen.__cause__
    return "refused" if isinstance(error, SwiftError) and not may_pass else "crash"


def _kind(error: BaseException) -> FailureKind | None:
    if isinstance(error, NonFiniteError):
        return "nonfinite"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out_of_memory"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return "out_of_memory"  # host allocators and other accelerators have no class of their own
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    if os.strerror(errno.ENOSPC) in str(error):  # safetensors has an error of its own for it
        return "disk"
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, (ConfigError, UsageError, ModelError)):
        return "config"
    return None
