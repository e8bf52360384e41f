"""Fused, as separate processes, or one after another: measured once for each machine and shape, then looked up."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.core.files import atomic_write_json, read_json
from swift.experiments.home import Home
from swift.experiments.types import JobSpec

__all__ = ["Choice", "choose", "measure_in_process", "shape_of"]

PLANS = ("separate", "fused", "sequence")
TOLERANCE = 0.98
"""Of the best speed: a plan is taken for its isolation (separate processes first) when it loses no more than this."""
MEASURE_SECONDS = 600.0
SHORT_SECONDS = 120.0
"""Of planned training in all: less is done before it is known whether it would have been faster otherwise."""
_OPERATIONS_PER_SECOND = {"cpu": 5e10, "other": 1e14}
"""Of whole training steps: the order of magnitude, to tell work of seconds from work of hours."""
_WORDS = {"fused": "fused", "separate": "as separate processes", "sequence": "one after another"}
_OF_THE_SHAPE = (
    "lora_rank", "target_modules", "target_regex", "per_device_train_batch_size", "max_length", "packing", "device",
    "torch_dtype", "quant_method", "quant_bits", "gradient_checkpointing", "modules_to_save",
)  # fmt: skip

Measure = Callable[[Sequence[JobSpec]], Mapping[str, float]]


def choose(seconds: Mapping[str, float]) -> tuple[str, str]:
    """(plan, why) from the seconds that one step of every member takes by each plan.

    Never one slower than `TOLERANCE` of the best.
    """
    best = min(seconds.values())
    plan = next(name for name in PLANS if name in seconds and best / seconds[name] >= TOLERANCE)
    others = [
        f"{_WORDS[name]} {seconds[name] / seconds[plan]:.2f}x the time"
        for name in PLANS
        if name in seconds and name != plan
    ]
    return plan, f"measured: {_WORDS[plan]} is fastest here ({', '.join(others)})"


def shape_of(specs: Sequence[JobSpec]) -> str:
    """What the speeds depend on: the machine, the model, the adapters, tokens of a micro-batch, number of members.

    Members, and tokens of a step, count in powers of two.
    """
    first = specs[0]
    estimate = first.estimate
    tokens = (estimate.get("tokens") or 0) / (estimate.get("steps") or 1)
    parts = [
        [platform.node(), platform.machine(), os.cpu_count(), os.environ.get("CUDA_VISIBLE_DEVICES")],
        [estimate.get("memory_key"), first.fuse.get("weights_bytes"), estimate.get("device")],
        [first.options.get(name) for name in _OF_THE_SHAPE],
        round(math.log2(max(1.0, tokens))),
        round(math.log2(len(specs))),
    ]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=10).hexdigest()


class Choice:
    """Judges with a memory in ``SWIFT_HOME``.

    Args:
        measure: None: what is not known runs as separate processes.
        say: told before something is measured.
    """

    def __init__(
        self, home: Home, measure: Measure | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.file = home.root / "fused-speeds.json"
        self.measure, self.say = measure, say

    def __call__(self, specs: Sequence[JobSpec]) -> tuple[str, str]:
        """The plan for trainings that could share a base, and why."""
        if int(specs[0].fuse.get("processes") or 1) > 1:
            return "separate", "groups of several processes are not measured; --fuse always fuses them"
        shape = shape_of(specs)
        known: dict[str, Any] = read_json(self.file)
        if shape not in known:
            if self.measure is None:
                return "separate", "it was not measured whether fusing pays"
            planned = sum(map(_seconds, specs))
            if planned < SHORT_SECONDS:
                return "separate", f"{planned:.0f} s of work in all: too little for a measurement to pay"
            self.say(f"measuring whether {len(specs)} trainings of this shape are faster fused (once)")
            try:
                found = dict(self.measure(specs))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                return "separate", f"fusing could not be measured: {error}"
            known = {**read_json(self.file), shape: found}
            atomic_write_json(self.file, known)
        return choose(known[shape])


def _seconds(spec: JobSpec) -> float:
    """Of training, as planned; without a pace by the operations alone; infinite where nothing is known."""
    estimate = spec.estimate
    if estimate.get("seconds") is not None:
        return float(estimate["seconds"])
    if not estimate.get("tokens") or not estimate.get("parameters"):
        return math.inf
    rate = _OPERATIONS_PER_SECOND["cpu" if estimate.get("device") in (None, "cpu") else "other"]
    return float(6 * estimate["tokens"] * estimate["parameters"] / rate)


def measure_in_process(specs: Sequence[JobSpec]) -> dict[str, float]:
    """Have ``swift fuse --measure`` find out, with the real model and data, in a process of its own.

    Raises:
        ValueError: it failed; with the end of what it said.
    """
    from swift.experiments.inventory import take_inventory

    cores = take_inventory().cores
    wanted = [{"command": spec.command, **spec.options} for spec in specs]
    with tempfile.TemporaryDirectory(prefix="swift-fuse-") as folder:
        file = Path(folder) / "runs.json"
        file.write_text(json.dumps({"runs": wanted, "cores": cores}))
        done = subprocess.run(
            [sys.executable, "-m", "swift", "fuse", "--measure", str(file)],
            cwd=specs[0].cwd,
            env={**os.environ, **specs[0].env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MEASURE_SECONDS,
        )
    if done.returncode != 0:
        raise ValueError(" ".join(done.stderr.split())[-400:] or f"exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
