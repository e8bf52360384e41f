"""Which device a run will find, asked without torch: NVIDIA's driver library, else its command, else the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from swift.core.devices import cpu_count, nvidia_memory

__all__ = ["DeviceFacts", "find_device"]


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
        # A process for each core: more than that only wait for one another.
        return DeviceFacts("cpu", cpu_count(), psutil.virtual_memory().total)
    return DeviceFacts(kind, None, None)
