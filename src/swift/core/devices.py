"""Devices: which to use, in which precision, what there is. torch is imported inside the functions."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

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

ACCELERATORS = ("cuda", "npu", "xpu", "mps")
"""The order in which ``auto`` looks for a device."""

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


def _accelerator_count(kind: str) -> int:
    """How many devices of this kind torch can use here."""
    import torch

    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "npu":
        if importlib.util.find_spec("torch_npu") is None:
            return 0
        importlib.import_module("torch_npu")  # adds torch.npu
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


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
            if _accelerator_count(kind):
                return pick_device(kind, local_rank)
        return torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, number = split_device(name if ":" in name else f"{name}:{local_rank}")
    count = _accelerator_count(kind)
    if number >= count:
        raise ConfigError(
            f"there is no device {name!r} here",
            where="--device",
            why=f"torch {torch.__version__} sees {count} {kind} device(s)",
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
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        # Without the argument, torch also counts the slow emulation on devices before Ampere.
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    if device.type == "npu":
        return True
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported()
    return False


def memory_in_use(device: torch.device) -> int | None:
    """Bytes of device memory this process holds now (reserved, so as the driver sees it); None on the CPU."""
    import torch

    if device.type == "cpu":
        return None
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return getattr(torch, device.type).memory_reserved(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on accelerators, resident memory of the process on the CPU."""
    import torch

    if device.type == "cpu":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return getattr(torch, device.type).max_memory_allocated(device)


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
        for index in range(_accelerator_count(kind)):
            device = torch.device(kind, index)
            entry: dict[str, Any] = {"kind": kind, "index": index, "bfloat16": _has_bfloat16(device)}
            if kind == "mps":
                entry |= {"name": "Apple GPU", "memory_bytes": torch.mps.recommended_max_memory()}
            else:
                properties = getattr(torch, kind).get_device_properties(index)
                entry |= {"name": properties.name, "memory_bytes": properties.total_memory}
            if kind == "cuda":
                entry["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(index))
            devices.append(entry)
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
