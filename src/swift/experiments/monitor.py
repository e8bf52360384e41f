"""Measurements of devices and host while jobs run, for ``swift top``, the report and ``/metrics``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from swift.experiments.inventory import host_memory
from swift.experiments.store import Store
from swift.experiments.types import Inventory

__all__ = ["Monitor", "measure_devices", "measure_host", "metrics_text"]

INTERVAL_SECONDS = 5.0


class Monitor:
    """Records a sample of everything every few seconds; the engine calls it only while jobs run."""

    def __init__(
        self,
        store: Store,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.interval_seconds, self._clock = store, interval_seconds, clock
        self._last = float("-inf")

    def sample(self, inventory: Inventory | None, disks: Iterable[Path]) -> bool:
        """Measure and record, if it is time; returns whether it did."""
        now = self._clock()
        if now - self._last < self.interval_seconds:
            return False
        self._last = now
        rows = [{"subject": "host", **measure_host(disks)}]
        rows += [{"subject": name, **values} for name, values in measure_devices(inventory).items()]
        self.store.record_samples(rows)
        return True


def measure_host(disks: Iterable[Path]) -> dict[str, Any]:
    """CPU in percent of all cores, memory in bytes, free bytes on the disks."""
    total, free = host_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_used_bytes": total - free,
        "memory_bytes": total,
        "disk_free_bytes": {str(path): shutil.disk_usage(path).free for path in disks if path.exists()},
    }


def measure_devices(inventory: Inventory | None) -> dict[str, dict[str, Any]]:
    """``cuda:0`` -> utilisation (percent), bytes used and in all, watts, Celsius; None where it does not tell."""
    indices = [device.index for device in inventory.devices if device.kind == "cuda"] if inventory else []
    if not indices:
        return {}
    import pynvml

    found = {}
    for index in indices:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError:
            continue  # gone for the moment; the inventory reports it
        found[f"cuda:{index}"] = {
            "memory_used_bytes": int(memory.used),
            "memory_bytes": int(memory.total),
            "utilisation_percent": _ask(
                lambda device: pynvml.nvmlDeviceGetUtilizationRates(device).gpu, handle
            ),
            "power_watts": _ask(lambda device: pynvml.nvmlDeviceGetPowerUsage(device) / 1000, handle),
            "temperature_celsius": _ask(
                lambda device: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU), handle
            ),
        }
    return found


def _ask(question: Callable[[Any], float], device: Any) -> float | None:
    import pynvml

    try:
        return question(device)
    except pynvml.NVMLError:
        return None  # not supported by this device


_GAUGES = {
    "memory_used_bytes": "Memory in use.",
    "memory_bytes": "Memory in all.",
    "utilisation_percent": "Share of time in which the device worked.",
    "power_watts": "Power drawn.",
    "temperature_celsius": "Temperature.",
    "cpu_percent": "CPU use in percent of all cores.",
}


def metrics_text(counts: dict[Any, int], samples: Iterable[dict[str, Any]], started: float) -> str:
    """Prometheus' text format: jobs by state, the newest sample of every subject.

    Args:
        samples: oldest first; later ones of a subject win.
    """
    lines = ["# HELP swift_jobs Jobs by state.", "# TYPE swift_jobs gauge"]
    lines += [f'swift_jobs{{state="{state}"}} {count}' for state, count in counts.items()]
    lines += [
        "# HELP swift_service_start_time_seconds When the service started.",
        "# TYPE swift_service_start_time_seconds gauge",
        f"swift_service_start_time_seconds {started:.3f}",
    ]
    newest = {sample["subject"]: sample for sample in samples}
    for name, text in _GAUGES.items():
        values = [
            (subject, sample[name]) for subject, sample in newest.items() if sample.get(name) is not None
        ]
        if values:
            lines += [f"# HELP swift_{name} {text}", f"# TYPE swift_{name} gauge"]
            lines += [f'swift_{name}{{subject="{_escape(subject)}"}} {value}' for subject, value in values]
    disks = newest.get("host", {}).get("disk_free_bytes", {})
    if disks:
        lines += ["# HELP swift_disk_free_bytes Free space.", "# TYPE swift_disk_free_bytes gauge"]
        lines += [f'swift_disk_free_bytes{{path="{_escape(path)}"}} {free}' for path, free in disks.items()]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
