"""What the machine has: accelerators with the memory that others left free, or CPU slots where there are none.

NVIDIA devices are asked through the driver library, so that no context is made on them. Others are looked for by
their device files, and only where those exist a short process asks torch, once. The service itself never imports it.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from swift.core.devices import cpu_count, describe_cpu
from swift.core.logging import get_logger
from swift.experiments.types import Device, Inventory

__all__ = ["VISIBLE_VARIABLES", "host_memory", "take_inventory", "visible_devices"]

VISIBLE_VARIABLES = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "rocm": "HIP_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}
"""Kind of device -> the variable that says which of them a process sees. MPS has one device and no variable."""

PROBE_SECONDS = 90.0
_PROBE = """
import json
from swift.core.devices import describe_devices
print(json.dumps([entry for entry in describe_devices() if entry["kind"] != "cpu"]))
"""
_HINTS = {
    "rocm": ("/dev/kfd",),
    "npu": ("/dev/davinci_manager",),
    "xpu": ("/sys/module/xe", "/sys/module/i915"),
}
_NO_DEVICES = ("", "-1", "none", "NoDevFiles")
_log = get_logger(__name__)
_cpu = functools.lru_cache(maxsize=1)(describe_cpu)


def take_inventory(
    own_pids: Collection[int] = (),
    reserved: Mapping[tuple[str, int], int] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cpu_slots: int | None = None,
) -> Inventory:
    """The machine as it is now.

    Args:
        own_pids: processes of our jobs; what they hold counts as free here (the scheduler counts it).
        reserved: (kind, index) -> bytes given to our jobs. Inside a container the driver lists no processes, or by
            numbers unknown here; memory held by those counts as ours up to this.
        env: whose visible-devices variables apply (default: this process's).
        cpu_slots: slots where there is no accelerator; default one a core.
    """
    env = os.environ if env is None else env
    reserved = reserved or {}
    total, free = host_memory(own_pids)
    devices = _nvidia_devices(own_pids, reserved, env) or _probed_devices(reserved, env)
    cores = cpu_count()
    if not devices:
        slots = max(1, min(cpu_slots or cores, cores))
        name = str(_cpu()["name"])
        devices = [Device("cpu", index, name, total // slots, free // slots) for index in range(slots)]
    return Inventory(tuple(devices), cores, total)


def visible_devices(kind: str, env: Mapping[str, str]) -> list[str] | None:
    """The entries of the kind's visible-devices variable; None when it is not set (all are visible).

    As CUDA does it, entries after an invalid one (-1) do not count.
    """
    value = env.get(VISIBLE_VARIABLES.get(kind, ""))
    if value is None:
        return None
    entries = []
    for entry in value.split(","):
        if entry.strip() in _NO_DEVICES:
            break
        entries.append(entry.strip())
    return entries


def host_memory(own_pids: Collection[int] = ()) -> tuple[int, int]:
    """(bytes in all, bytes not taken by processes other than ``own_pids``), within the container's limit."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max" and int(limit) < total:
            total = int(limit)
            held = int((group / "memory.current").read_text())
            cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(free, total - held + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control groups (another system, or version 1): the host's numbers hold
    return total, min(total, max(0, free) + sum(map(_resident_bytes, own_pids)))


def _resident_bytes(pid: int) -> int:
    try:
        memory = psutil.Process(pid).memory_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    # Pages shared between processes (libraries, the warm template's memory) must not count once for each.
    return int(memory.rss - getattr(memory, "shared", 0))


def _nvidia_devices(
    own_pids: Collection[int], reserved: Mapping[tuple[str, int], int], env: Mapping[str, str]
) -> list[Device]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()  # counted by the library; the second and later ones cost nothing
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    visible = visible_devices("cuda", env)
    devices = []
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if visible is not None and not _is_named(index, _text(pynvml.nvmlDeviceGetUUID(handle)), visible):
                continue
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            holders = _holders(pynvml, handle)
            name = _text(pynvml.nvmlDeviceGetName(handle))
        except pynvml.NVMLError as error:
            _log.warning("cuda:%d does not answer and is left out: %s", index, error)
            continue
        free, foreign = share_memory(
            int(memory.total), int(memory.used), holders, own_pids, reserved.get(("cuda", index), 0)
        )
        devices.append(Device("cuda", index, name, int(memory.total), free, foreign))
    return devices


def _holders(pynvml: Any, handle: Any) -> dict[int, int]:
    """pid -> bytes of the processes on a device; 0 bytes where the driver does not tell."""
    holders: dict[int, int] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            for process in ask(handle):
                size = int(process.usedGpuMemory or 0)
                holders[process.pid] = max(size, holders.get(process.pid, 0))
        except pynvml.NVMLError:
            continue  # not supported on this device; its memory still counts as used by somebody
    return holders


def share_memory(
    total: int, used: int, holders: Mapping[int, int], own_pids: Collection[int], reserved: int
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(bytes not taken by other people, their (pid, bytes)) of one device.

    A holder is foreign when its pid runs here and is not ours. What nobody listed holds is ours up to ``reserved``
    less what ours are seen to hold, and foreign (or the driver's) above that.
    """
    foreign = tuple(
        (pid, size) for pid, size in sorted(holders.items()) if pid not in own_pids and psutil.pid_exists(pid)
    )
    theirs = sum(size for _, size in foreign)
    ours = sum(size for pid, size in holders.items() if pid in own_pids)
    unknown = max(0, used - theirs - ours)
    theirs += max(0, unknown - max(0, reserved - ours))
    return max(0, total - theirs), foreign


def _is_named(index: int, uuid: str, visible: Collection[str]) -> bool:
    return any(
        entry == str(index) or (entry.startswith("GPU-") and uuid.startswith(entry)) for entry in visible
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _probed_devices(reserved: Mapping[tuple[str, int], int], env: Mapping[str, str]) -> list[Device]:
    """Devices of other makers, where something hints at them."""
    hints = tuple(kind for kind, paths in _HINTS.items() if any(Path(path).exists() for path in paths))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        hints += ("mps",)
    if not hints:
        return []
    variables = tuple(sorted((name, env[name]) for name in VISIBLE_VARIABLES.values() if name in env))
    devices = []
    for entry in _ask_torch(variables):
        # AMD's devices call themselves cuda in torch; they have a visible-devices variable of their own.
        kind = "rocm" if entry["kind"] == "cuda" and "rocm" in hints else entry["kind"]
        index = _physical_index(kind, entry["index"], env)
        total = int(entry["memory_bytes"])
        used = _rocm_used(index) if kind == "rocm" else None
        free, foreign = (
            (total, ()) if used is None else share_memory(total, used, {}, (), reserved.get((kind, index), 0))
        )
        devices.append(Device(kind, index, str(entry["name"]), total, free, foreign))
    return devices


def _physical_index(kind: str, index: int, env: Mapping[str, str]) -> int:
    """torch counts what is visible; the variable counts all."""
    visible = visible_devices(kind, env)
    if visible is not None and index < len(visible) and visible[index].isdigit():
        return int(visible[index])
    return index


@functools.lru_cache(maxsize=4)
def _ask_torch(variables: tuple[tuple[str, str], ...]) -> tuple[dict[str, Any], ...]:
    """What torch sees, asked in a process of its own with a deadline; asked once, devices do not come and go."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, **dict(variables)},
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
        return tuple(json.loads(answer.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        _log.warning("accelerators are there, but torch could not be asked about them: %s", error)
        return ()


def _rocm_used(index: int) -> int | None:
    """Bytes in use on an AMD device, from the kernel driver; None where it does not tell."""
    files = Path("/sys/class/drm").glob("card[0-9]*/device/mem_info_vram_used")
    cards = sorted(files, key=lambda file: file.parent.resolve().name)  # by address on the bus, as HIP counts
    if index >= len(cards):
        return None
    try:
        return int(cards[index].read_text())
    except (OSError, ValueError):
        return None
