"""What is asked of a kind of device. One file beside this one for each kind; torch is imported inside the methods."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Backend", "TorchModule", "backend_of"]

KINDS = ("cuda", "npu", "xpu", "mps", "cpu")
"""The order in which ``auto`` looks for a device."""


class Backend(Protocol):
    """A kind of device.

    Attributes:
        kind: torch's word for it.
        communication: backend of `torch.distributed` for its tensors.
    """

    kind: str
    communication: str

    def count(self) -> int:
        """How many of them torch can use here."""

    def missing(self) -> str:
        """Why there is none, for a refusal."""

    def has_bfloat16(self, device: torch.device) -> bool:
        """Whether it computes in bfloat16 as fast as in float16."""

    def describe(self, index: int) -> dict[str, Any]:
        """``name``, ``memory_bytes``, and what else is known of one."""

    def memory_in_use(self, device: torch.device) -> int | None:
        """Bytes of device memory this process holds now (reserved, so as the driver sees it); None: host memory."""

    def peak_memory(self, device: torch.device) -> int:
        """Most bytes held so far."""


class TorchModule:
    """What ``torch.cuda``, ``torch.npu`` and ``torch.xpu`` have in common."""

    kind: str

    def _module(self) -> Any:
        import torch

        return getattr(torch, self.kind)

    def count(self) -> int:
        module = self._module()
        return int(module.device_count()) if module.is_available() else 0

    def describe(self, index: int) -> dict[str, Any]:
        properties = self._module().get_device_properties(index)
        return {"name": properties.name, "memory_bytes": properties.total_memory}

    def memory_in_use(self, device: torch.device) -> int | None:
        return int(self._module().memory_reserved(device))

    def peak_memory(self, device: torch.device) -> int:
        return int(self._module().max_memory_allocated(device))


def backend_of(kind: str) -> Backend:
    """The backend of one of `KINDS`."""
    found: Backend = import_module(f"swift.core.backends.{kind}").BACKEND
    return found
