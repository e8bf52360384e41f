"""Apple's GPU: one, with the host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND"]


class _Mps:
    kind, communication = "mps", "gloo"  # several processes on one GPU bring nothing

    def count(self) -> int:
        import torch

        return int(torch.backends.mps.is_available())

    def missing(self) -> str:
        return "torch finds no Apple GPU (macOS on Apple silicon has one)"

    def has_bfloat16(self, device: torch.device) -> bool:
        return False

    def describe(self, index: int) -> dict[str, Any]:
        import torch

        return {"name": "Apple GPU", "memory_bytes": torch.mps.recommended_max_memory()}

    def memory_in_use(self, device: torch.device) -> int | None:
        import torch

        return torch.mps.driver_allocated_memory()

    def peak_memory(self, device: torch.device) -> int:
        import torch

        return torch.mps.driver_allocated_memory()


BACKEND = _Mps()
