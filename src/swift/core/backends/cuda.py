"""NVIDIA's devices, and AMD's, which ROCm's torch calls cuda too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift.core.backends.base import TorchModule

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND"]


class _Cuda(TorchModule):
    kind, communication = "cuda", "nccl"  # RCCL under ROCm, by the same name

    def missing(self) -> str:
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA and ROCm"
        return f"torch {torch.__version__} finds no device: is the driver there (nvidia-smi, rocm-smi)?"

    def has_bfloat16(self, device: torch.device) -> bool:
        import torch

        # Without the argument, torch also counts the slow emulation on devices before Ampere.
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None

    def describe(self, index: int) -> dict[str, Any]:
        capability = "{}.{}".format(*self._module().get_device_capability(index))
        return {**super().describe(index), "capability": capability}


BACKEND = _Cuda()
