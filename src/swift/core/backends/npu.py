"""Huawei's Ascend NPUs, through torch_npu."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from swift.core.backends.base import TorchModule

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND"]


class _Npu(TorchModule):
    kind, communication = "npu", "hccl"

    def count(self) -> int:
        if importlib.util.find_spec("torch_npu") is None:
            return 0
        importlib.import_module("torch_npu")  # adds torch.npu
        return super().count()

    def missing(self) -> str:
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        return "torch_npu finds no device: are the driver and CANN there (npu-smi info)?"

    def has_bfloat16(self, device: torch.device) -> bool:
        return True


BACKEND = _Npu()
