"""What is free on the machine: accelerators (memory, jobs beside each other) and the host (cores, memory).

Both sides answer the same three questions about a request: where does it go, why does it not fit, and what must be
kept free so that it will fit soon. All numbers are bytes, devices or threads; nothing here asks the real machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swift.core.format import format_bytes
from swift.experiments.types import Device, Placement

__all__ = ["Accelerators", "Host", "Request", "Use"]

_SHOWN = 4
"""Devices named in a reason, at most."""


@dataclass(frozen=True)
class Request:
    """What a job needs: devices, bytes on each (None: not known, so all of it), threads, and devices of its own.

    ``by_hand``: the user said how much memory, not the plan.
    """

    devices: int
    memory_bytes: int | None
    threads: int | None
    whole: bool
    by_hand: bool = False

    def less_memory(self, most: int) -> str:
        """How it comes to fit ``most`` bytes."""
        if self.by_hand:
            return f"memory: {most >> 20}MiB"
        return "a smaller batch or max_length, or checkpointing"


@dataclass(frozen=True)
class Use:
    """A job that runs: where, and whether its devices are its own. Listed oldest first."""

    placement: Placement
    whole: bool


@dataclass
class _Slot:
    """One accelerator. ``kept_for``: the blocked job it is reserved for, which leaves ``slack`` to others."""

    device: Device
    capacity: int
    uses: list[Use] = field(default_factory=list)
    used: int = 0
    taken: bool = False
    kept_for: str | None = None
    slack: int = 0
    slack_jobs: int = 0

    @property
    def name(self) -> str:
        return f"{self.device.kind}:{self.device.index}"

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def add(self, use: Use) -> None:
        self.uses.append(use)
        self.used += use.placement.memory_bytes
        self.taken |= use.whole
        self.slack -= use.placement.memory_bytes
        self.slack_jobs -= 1

    def fits(self, request: Request, limit: int) -> bool:
        memory = request.memory_bytes or 0
        if self.taken or memory > self.free or (request.whole and (self.uses or self.kept_for)):
            return False
        if len(self.uses) >= limit:
            return False
        return self.kept_for is None or (memory <= self.slack and self.slack_jobs > 0)

    def describe(self, request: Request, limit: int) -> str:
        """Why the request does not fit here."""
        if self.taken or (request.whole and self.uses) or len(self.uses) >= limit:
            return f"{self.name} runs {_jobs(len(self.uses))}"
        if (request.memory_bytes or 0) > self.free:
            others = sum(size for _, size in self.device.foreign)
            note = f" (other people's processes hold {format_bytes(others)})" if others else ""
            return f"{format_bytes(max(0, self.free))} free on {self.name}{note}"
        return f"{self.name} is kept for {self.kept_for}"

    def must_end(self, request: Request, limit: int) -> tuple[int, int, int]:
        """(bytes of jobs that must end before the request fits, slack bytes and slack jobs beside it then).

        Counted from the oldest: jobs that came later are allowed beside it only as far as there is room for both,
        so what must end never grows while somebody waits for it.
        """
        if request.whole:
            return self.used, 0, 0
        room = self.capacity - (request.memory_bytes or 0)
        rest, count, ending = self.used, len(self.uses), 0
        for use in self.uses:
            if rest <= room and count < limit and not self.taken:
                break
            size = use.placement.memory_bytes
            rest, count, ending = rest - size, count - 1, ending + size
        return ending, room - rest, limit - 1 - count


class Accelerators:
    """All accelerators, those of one kind, name and size together: a job never spans different ones.

    Args:
        running: jobs that hold devices, oldest first.
        usable: share of a device's memory that jobs may plan with; the rest is lost to fragmentation.
        jobs_per_device: at most so many beside each other.
    """

    def __init__(
        self, devices: Iterable[Device], running: Iterable[Use], usable: float, jobs_per_device: int
    ) -> None:
        self._limit = jobs_per_device
        self._usable = usable
        self._groups: dict[tuple[str, str, int], list[_Slot]] = {}
        for device in devices:
            slot = _Slot(device, device.free_bytes - round((1 - usable) * device.memory_bytes))
            self._groups.setdefault((device.kind, device.name, device.memory_bytes), []).append(slot)
        self._slots = [slot for group in self._groups.values() for slot in group]
        by_place = {(slot.device.kind, slot.device.index): slot for slot in self._slots}
        for use in running:
            for index in use.placement.devices:
                held = by_place.get((use.placement.kind, index))
                if held is not None:  # else the device is gone, and with it the question
                    held.add(use)

    def __len__(self) -> int:
        return len(self._slots)

    def impossible(self, request: Request) -> tuple[str, str] | None:
        """(why, fix) when even the empty machine cannot run it; None when it can."""
        if not self._slots:
            return (
                f"asks for {_devices(request.devices)}, this machine has none",
                "devices: 0 runs it on the CPU",
            )
        memory = request.memory_bytes or 0
        largest = max(self._whole_bytes(slot) for slot in self._slots)
        if memory > largest:
            return (
                f"needs {format_bytes(memory)} on a device, at most {format_bytes(largest)} can be used here",
                request.less_memory(largest),
            )
        most = max(sum(self._whole_bytes(s) >= memory for s in group) for group in self._groups.values())
        if request.devices > most:
            return (
                f"asks for {_devices(request.devices)}, this machine has {most} alike"
                + (f" with {format_bytes(memory)}" if memory else ""),
                f"devices: {most}",
            )
        return None

    def idle_wanted(self, request: Request) -> int:
        """Idle devices without which the request will hardly start: those it wants whole, or more than half of."""
        if request.whole or 2 * (request.memory_bytes or 0) > max(map(self._whole_bytes, self._slots)):
            return request.devices
        return 0

    def _whole_bytes(self, slot: _Slot) -> int:
        return round(self._usable * slot.device.memory_bytes)

    def place(self, request: Request, cores: int, wanted: int) -> tuple[Placement, str] | None:
        """Where it goes, and why there; None when nowhere.

        Args:
            wanted: idle devices that waiting jobs need (`idle_wanted`). A job that can share takes an idle device only
                when these are left over, else it goes beside others, where the least memory stays unused. While
                nobody needs idle devices, jobs are spread, for they compete for more than memory.
        """
        if request.whole:
            chosen, reason = self._place_whole(request)
        else:
            chosen, reason = self._place_shared(request, wanted)
        if not chosen:
            return None
        room = min(slot.free for slot in chosen)
        memory = room if request.whole or request.memory_bytes is None else request.memory_bytes
        threads = request.threads or max(1, cores * len(chosen) // len(self._slots))
        devices = tuple(slot.device.index for slot in chosen)
        placement = Placement(chosen[0].device.kind, devices, memory, threads)
        for slot in chosen:
            slot.add(Use(placement, request.whole))
        return placement, reason

    def _place_whole(self, request: Request) -> tuple[list[_Slot], str]:
        best: list[_Slot] = []
        for group in self._groups.values():
            fitting = sorted((s for s in group if s.fits(request, self._limit)), key=lambda s: s.free)
            # The group with the smallest devices that suffice.
            if len(fitting) >= request.devices and (not best or fitting[0].free < best[0].free):
                best = fitting[: request.devices]
        best = sorted(best, key=lambda slot: slot.device.index)
        return best, f"has {', '.join(slot.name for slot in best)} to itself" if best else ""

    def _place_shared(self, request: Request, wanted: int) -> tuple[list[_Slot], str]:
        fitting = [slot for slot in self._slots if slot.fits(request, self._limit)]
        if not fitting:
            return [], ""
        idle = [slot for slot in fitting if not slot.uses]
        busy = [slot for slot in fitting if slot.uses]
        num_idle = sum(not slot.uses for slot in self._slots)
        pool = idle if idle and (num_idle > wanted or not busy) else busy
        slot = min(pool, key=lambda s: (0 if wanted else len(s.uses), s.free, s.device.kind, s.device.index))
        need = format_bytes(request.memory_bytes or 0)
        if not slot.uses:
            return [slot], f"{slot.name} is idle: {need} needed, {format_bytes(slot.free)} free"
        return [slot], (
            f"best fit: {need} needed, {format_bytes(slot.free)} free on {slot.name} beside {_jobs(len(slot.uses))}"
        )

    def explain(self, request: Request) -> str:
        """Why it does not fit now."""
        blocked, most = [], 0
        for group in self._groups.values():
            refusing = [slot for slot in group if not slot.fits(request, self._limit)]
            blocked += refusing
            if len(group) >= request.devices:
                most = max(most, len(group) - len(refusing))
        missing = request.devices - most
        if request.whole:
            what = f"waits for {missing} more free {'device' if missing == 1 else 'devices'}"
        else:
            what = "waits for room on a device"
        need = (
            f"{format_bytes(request.memory_bytes)} needed" + (" on each" if request.devices > 1 else "")
            if request.memory_bytes
            else f"{_devices(request.devices)} needed"
        )
        blocked.sort(key=lambda slot: (bool(slot.kept_for), slot.taken, -slot.free))
        named = [slot.describe(request, self._limit) for slot in blocked[:_SHOWN]]
        if len(blocked) > _SHOWN:
            named.append(f"{len(blocked) - _SHOWN} more")
        return f"{what}: {need}; {', '.join(named)}"

    def reserve(self, job_id: str, request: Request) -> list[str]:
        """Keep the devices on which the least must end before the request fits; their names, or [] when none could.

        The choice depends on sums that only fall while the job waits, so it moves from one device to another only
        towards an earlier start, and small jobs cannot push it away.
        """
        best: list[tuple[int, int, _Slot, int, int]] = []
        memory = request.memory_bytes or 0
        for group in self._groups.values():
            options = []
            for slot in group:
                # Other people's processes may leave too little: nothing of ours to wait for there.
                if slot.capacity >= memory:
                    ending, slack, jobs = slot.must_end(request, self._limit)
                    options.append((ending, slot.device.index, slot, slack, jobs))
            options.sort(key=lambda option: option[:2])
            chosen = options[: request.devices]
            if len(chosen) == request.devices and (
                not best or sum(option[0] for option in chosen) < sum(option[0] for option in best)
            ):
                best = chosen
        for _, _, slot, slack, jobs in best:
            slot.kept_for, slot.slack, slot.slack_jobs = job_id, slack, jobs
        return [option[2].name for option in best]


class Host:
    """CPU slots where there are no accelerators; where there are, the cores for jobs that use none.

    Memory is one pool: it is the machine's, not a slot's.
    """

    def __init__(
        self, slots: Sequence[Device], cores: int, memory_bytes: int, running: Iterable[Use], usable: float
    ) -> None:
        self._indices = [slot.index for slot in slots]
        self._total = len(slots) or cores
        self._slot_threads = max(1, cores // self._total)
        reserve = round((1 - usable) * memory_bytes)
        self._capacity = (sum(slot.free_bytes for slot in slots) if slots else memory_bytes) - reserve
        self._most = memory_bytes - reserve
        self._uses = list(running)
        self._free = self._total - sum(map(self._width, self._uses))
        self._memory = self._capacity - sum(map(_total_bytes, self._uses))
        self._kept_for: str | None = None
        self._slack, self._slack_memory = 0, 0

    def _width(self, use: Use) -> int:
        """Slots a running job takes."""
        return len(use.placement.devices) or math.ceil(use.placement.threads / self._slot_threads)

    def _wants(self, request: Request) -> tuple[int, int]:
        """(slots, bytes in all) of a request."""
        width = max(1, request.devices, math.ceil((request.threads or 1) / self._slot_threads))
        if request.memory_bytes is None:
            return width, max(0, self._most) * width // self._total
        return width, request.memory_bytes * max(1, request.devices)

    def impossible(self, request: Request) -> tuple[str, str] | None:
        """(why, fix) when even the empty machine cannot run it; None when it can."""
        if request.devices > self._total:
            there = f"{self._total} CPU slots and no accelerator" if self._indices else f"{self._total} cores"
            return (
                f"asks for {_devices(request.devices)}, this machine has {there}",
                f"devices: {self._total} or fewer",
            )
        width, memory = self._wants(request)
        if width > self._total:
            most = self._total * self._slot_threads
            return f"asks for {request.threads} threads, this machine has {most}", f"threads: {most}"
        if memory > self._most:
            return (
                f"needs {format_bytes(memory)} of memory, at most {format_bytes(self._most)} can be used here",
                request.less_memory(self._most // max(1, request.devices)),
            )
        return None

    def place(self, request: Request) -> tuple[Placement, str] | None:
        """Where it goes, and why there; None when nowhere."""
        width, memory = self._wants(request)
        if not self._fits(width, memory):
            return None
        threads = request.threads or width * self._slot_threads
        taken = {index for use in self._uses for index in use.placement.devices}
        devices = tuple(index for index in self._indices if index not in taken)[:width]
        placement = Placement("cpu", devices, math.ceil(memory / max(1, len(devices))), threads)
        reason = f"{width} of {self._free} free CPU {'slots' if self._indices else 'cores'}"
        reason += f", {format_bytes(memory)} of {format_bytes(self._memory)} free memory"
        self._uses.append(Use(placement, whole=True))
        self._free -= width
        self._memory -= memory
        self._slack -= width
        self._slack_memory -= memory
        return placement, reason

    def _fits(self, width: int, memory: int) -> bool:
        if width > self._free or memory > self._memory:
            return False
        return self._kept_for is None or (width <= self._slack and memory <= self._slack_memory)

    def explain(self, request: Request) -> str:
        """Why it does not fit now."""
        width, memory = self._wants(request)
        what = "CPU slot" if self._indices else "core"
        if width > self._free:
            missing = width - self._free
            kind = what if missing == 1 else f"{what}s"
            return f"waits for {missing} more free {kind}: {width} needed, {self._free} free"
        if memory > self._memory:
            free = format_bytes(max(0, self._memory))
            return f"waits for memory: {format_bytes(memory)} needed, {free} free on this machine"
        return f"waits for {self._kept_for}, for which {what}s and memory are kept free"

    def reserve(self, job_id: str, request: Request) -> list[str]:
        """Keep slots and memory for it: only what fits beside it, once the oldest jobs have ended, may start."""
        width, memory = self._wants(request)
        free, rest = self._free, self._memory
        for use in self._uses:
            if free >= width and rest >= memory:
                break
            free, rest = free + self._width(use), rest + _total_bytes(use)
        if free < width or rest < memory:
            return []  # other people's processes hold the memory
        self._kept_for, self._slack, self._slack_memory = job_id, free - width, rest - memory
        return ["the CPU"]


def _total_bytes(use: Use) -> int:
    return use.placement.memory_bytes * max(1, len(use.placement.devices))


def _devices(count: int) -> str:
    return f"{count} device{'' if count == 1 else 's'}"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"
