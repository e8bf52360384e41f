"""Devices: which to use, in which precision, what there is. torch is imported inside the functions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from swift.core.backends.base import KINDS, backend_of
from swift.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "cpu_count",
    "describe_cpu",
    "describe_devices",
    "memory_in_use",
    "nvidia_memory",
    "peak_memory",
    "pick_device",
    "pick_dtype",
    "split_device",
]

ACCELERATORS = tuple(kind for kind in KINDS if kind != "cpu")

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""CPU features that decide how fast linear algebra runs, by the names of /proc/cpuinfo."""

_NVIDIA_SMI_SECONDS = 5.0


def cpu_count() -> int:
    """Cores this process may use: its affinity mask, cut by the container's CPU quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def split_device(name: str, where: str = "--device") -> tuple[str, int]:
    """Kind and number of an accelerator: ``cuda:1`` is ("cuda", 1). Raises ConfigError for other words."""
    found = re.fullmatch(rf"({'|'.join(ACCELERATORS)})(?::(\d+))?", name)
    if found is None:
        raise ConfigError(
            f"unknown device {name!r}", where=where, fix=f"auto, cpu, {', '.join(ACCELERATORS)}, or cuda:1"
        )
    return found[1], int(found[2] or 0)


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called ``name``; ``auto`` is the first of cuda, npu, xpu, mps that exists, else the CPU.

    ``local_rank``: of a kind without a number, this one.

    Raises ConfigError when the device does not exist here.
    """
    import torch

    if name == "auto":
        for kind in ACCELERATORS:
            if backend_of(kind).count():
                return pick_device(kind, local_rank)
        return torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, number = split_device(name if ":" in name else f"{name}:{local_rank}")
    backend = backend_of(kind)
    count = backend.count()
    if number >= count:
        raise ConfigError(
            f"there is no device {name!r} here",
            where="--device",
            why=f"torch {torch.__version__} sees {count} {kind} device(s)" if count else backend.missing(),
            fix="--device auto",
        )
    return torch.device(kind) if kind == "mps" else torch.device(kind, number)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision ``name``; ``auto`` is bfloat16 on accelerators that compute in it, else float32."""
    import torch

    if name != "auto":
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"unknown precision {name!r}", fix="auto, float32, float16 or bfloat16")
        return dtype
    return torch.bfloat16 if backend_of(device.type).has_bfloat16(device) else torch.float32


def memory_in_use(device: torch.device) -> int | None:
    """Bytes of device memory this process holds now (reserved, so as the driver sees it); None on the CPU."""
    return backend_of(device.type).memory_in_use(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on accelerators, resident memory of the process on the CPU."""
    return backend_of(device.type).peak_memory(device)


def describe_cpu() -> dict[str, Any]:
    """Name, cores, memory and linear-algebra features of the host; without torch."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux: the name from platform has to do
    return {
        "kind": "cpu",
        "index": 0,
        "name": name,
        "cores": cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "features": [flag for flag in CPU_FLAGS if flag in flags],
    }


def describe_devices() -> list[dict[str, Any]]:
    """Every accelerator torch can use, then the CPU.

    Each entry has ``kind, index, name, memory_bytes``; accelerators also ``bfloat16``, CUDA ``capability``.
    """
    import torch

    devices: list[dict[str, Any]] = []
    for kind in ACCELERATORS:
        backend = backend_of(kind)
        for index in range(backend.count()):
            bfloat16 = backend.has_bfloat16(torch.device(kind, index))
            devices.append({"kind": kind, "index": index, "bfloat16": bfloat16, **backend.describe(index)})
    return [*devices, describe_cpu()]


def nvidia_memory() -> list[int]:
    """Bytes of each NVIDIA device, asked without torch; empty where there is none, or no driver to ask."""
    try:
        import pynvml
    except ImportError:
        return _ask_nvidia_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles: list[Any] = [
            pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
        ]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _ask_nvidia_smi() -> list[int]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
        return [int(line) << 20 for line in answer.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not answer counts as none
        return []
