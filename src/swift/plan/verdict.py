"""Whether memory, disk and devices suffice for a plan."""

from __future__ import annotations

import math

from swift.core.format import format_bytes
from swift.plan.device import DeviceFacts
from swift.plan.result import Plan
from swift.plan.serving import serving_fits

__all__ = ["fits"]

TIGHT_SHARE = 0.95
"""A total above this share of the device does not fit: allocators lose some to fragmentation."""


def fits(plan: Plan, device: DeviceFacts) -> bool | None:
    """Whether it fits (``plan.memory["fits"]``: whether its memory does); adds the warnings that say why not."""
    verdict: bool | None = None
    if "least" in plan.memory:
        verdict = serving_fits(plan.memory, TIGHT_SHARE, plan.warnings)
    elif plan.memory and device.memory_bytes is not None:
        verdict = plan.memory["total"] <= TIGHT_SHARE * device.memory_bytes
        if not verdict:
            needed, there = format_bytes(plan.memory["total"]), format_bytes(device.memory_bytes)
            hint = _more_room(plan, device)
            plan.warnings.append(
                f"memory: about {needed} on a {device.kind} device of {there}" + (f"; {hint}" if hint else "")
            )
    if plan.memory:
        plan.memory["fits"] = verdict
    if "disk" in plan.memory:
        disk = plan.memory["disk"]
        if disk["total_bytes"] > disk["free_bytes"]:
            what, fix = ("checkpoints need", "--save_total_limit 1 keeps fewer")
            if disk.get("checkpoints") == 1:
                fix = "--output_dir on another disk, or --save_only_model true (no resume)"
            if plan.export:
                what, fix = ("an export needs", "--output_dir on another disk")
            plan.warnings.append(
                f"disk: {what} about {format_bytes(disk['total_bytes'])},"
                f" {format_bytes(disk['free_bytes'])} are free; {fix}"
            )
    if plan.parallel["devices_needed"] > (device.count if device.count is not None else math.inf):
        plan.warnings.append(
            f"the layout needs {plan.parallel['devices_needed']} devices, {device.count} {device.kind} found here"
        )
        verdict = False
    return verdict


def _more_room(plan: Plan, device: DeviceFacts) -> str:
    """Where to look for what makes it fit; empty when the plan has said it."""
    if plan.export:
        return "a machine with more memory" if device.kind == "cpu" else "another machine, or --device cpu"
    return "" if plan.solution else f"swift plan {plan.command} ... --solve says what makes it fit"
