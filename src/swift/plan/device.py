"""Which device a run will find, asked without torch: NVIDIA's driver library, else its command, else the host."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from typing import Any

import psutil

__all__ = ["DeviceFacts", "find_device", "nvidia_memory"]

_DEADLINE_SECONDS = 5.0


@dataclass(frozen=True)
class DeviceFacts:
    """Kind of device, how many there are, memory of one; None where this cannot be known from here."""

    kind: str
    count: int | None
    memory_bytes: int | None


def find_device(name: str, memory_bytes: int | None = None) -> DeviceFacts:
    """The device a ``--device`` value will mean on this machine.

    ``memory_bytes``: it has so much memory, whether it is here or not.
    """
    found = _find(name)
    if memory_bytes is None:
        return found
    return replace(found, count=found.count or None, memory_bytes=memory_bytes)


def _find(name: str) -> DeviceFacts:
    kind, _, index = name.partition(":")
    if kind in ("auto", "cuda"):
        memory = nvidia_memory()
        if memory:
            chosen = int(index) if index.isdigit() and int(index) < len(memory) else 0
            return DeviceFacts("cuda", len(memory), memory[chosen])
        if kind == "cuda":
            return DeviceFacts("cuda", 0, None)
    if kind in ("auto", "cpu"):
        return DeviceFacts("cpu", 1, psutil.virtual_memory().total)
    return DeviceFacts(kind, None, None)


def nvidia_memory() -> list[int]:
    """Bytes of each NVIDIA device; empty where there is none, or no driver to ask."""
    try:
        import pynvml
    except ImportError:
        return _ask_command()
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


def _ask_command() -> list[int]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, check=True)
        return [int(line) << 20 for line in answer.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not answer counts as none
        return []
