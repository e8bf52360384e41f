"""The host."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND"]


class _Cpu:
    kind, communication = "cpu", "gloo"

    def count(self) -> int:
        return 1

    def missing(self) -> str:
        return "there is always one"

    def has_bfloat16(self, device: torch.device) -> bool:
        return False  # AMX has it, but small models gain nothing

    def describe(self, index: int) -> dict[str, Any]:
        from swift.core.devices import describe_cpu

        return describe_cpu()

    def memory_in_use(self, device: torch.device) -> int | None:
        return None

    def peak_memory(self, device: torch.device) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


BACKEND = _Cpu()
