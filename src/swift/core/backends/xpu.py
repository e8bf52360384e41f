"""Intel's GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift.core.backends.base import TorchModule

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND"]


class _Xpu(TorchModule):
    kind, communication = "xpu", "xccl"

    def missing(self) -> str:
        import torch

        return f"torch {torch.__version__} finds no Intel GPU (a build with XPU and the driver are needed)"

    def has_bfloat16(self, device: torch.device) -> bool:
        return bool(self._module().is_bf16_supported())


BACKEND = _Xpu()
