"""What fits into a memory: the largest batch, length and rank, and the changes that make a too large run fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.bind import dump
from swift.config.schema import Resolved, Source
from swift.models.facts import ModelFacts
from swift.plan.analytic import Setup
from swift.plan.device import DeviceFacts
from swift.plan.ladder import Change, changes
from swift.plan.setup import Widest, make_setup, parts_of
from swift.rl.sizes import answers_in_step, derive_sizes

__all__ = ["Situation", "solve"]

MOST = {"per_device_train_batch_size": 4096, "lora_rank": 1024}
MAX_CHANGES = 24


@dataclass(frozen=True)
class Situation:
    """A run and the device it is for.

    Attributes:
        limit: bytes that may be used.
        widest_of: the largest micro-batch that its options can make.
    """

    resolved: Resolved
    facts: ModelFacts
    folder: Path | None
    device: DeviceFacts
    limit: int
    widest_of: Callable[[Resolved], Widest]

    def with_options(self, overrides: Mapping[str, Any]) -> Resolved:
        """The run with other values of some options; what was derived from the tuner is left as it is."""
        changed = copy.deepcopy(self.resolved)
        for name, value in overrides.items():
            changed.put(name, value, Source("flag", f"--{name}"))
        if changed.config.rlhf.is_policy:
            if changed.sources["generation_batch_size"].kind == "derived":
                changed.config.policy.generation_batch_size = None
            derive_sizes(changed, answers_in_step(changed))
        return changed

    def setup(self, resolved: Resolved) -> Setup:
        """What decides its memory."""
        return make_setup(resolved, self.facts, self.folder, self.device, self.widest_of(resolved), [])

    def total(self, overrides: Mapping[str, Any]) -> int:
        """Bytes at the peak by the formulas."""
        resolved = self.with_options(overrides)
        return sum(parts_of(resolved, self.facts, self.setup(resolved), self.device).values())


def solve(situation: Situation) -> dict[str, Any]:
    """The solution part of a plan.

    ``largest``: for batch, length and rank the largest value that fits while all else stays (None: not even the
    smallest does); ``changes``: those that make the run fit, the cheapest first, each with what is then needed;
    ``flags``: all of them to paste; ``fits``: whether the run fits with them.
    """
    config = situation.resolved.config
    context = situation.facts.max_position_embeddings or config.data.max_length or 0
    ranges = {**MOST, "max_length": max(context, config.data.max_length or 0)}
    if config.tuner.tuner_type != "lora":
        del ranges["lora_rank"]
    chosen, total = _cheapest(situation)
    return {
        "limit_bytes": situation.limit,
        "largest": {name: _largest(situation, name, most) for name, most in ranges.items()},
        "changes": [{"flags": _flags(change.overrides), "total_bytes": needed} for change, needed in chosen],
        "flags": _flags(_merge([change for change, _ in chosen])),
        "total_bytes": total,
        "fits": total <= situation.limit,
    }


def _largest(situation: Situation, name: str, most: int) -> int | None:
    """Doubling, then halving the interval: memory grows with every one of these options."""

    def fits(value: int) -> bool:
        return situation.total({name: value}) <= situation.limit

    least = 8 if name == "max_length" else 1
    if not fits(least):
        return None
    low, high = least, 2 * least
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _cheapest(situation: Situation) -> tuple[list[tuple[Change, int]], int]:
    """(changes with what is needed after each, what is needed in the end).

    Rungs are taken from the cheapest on, again and again while they help; then those are left out, from the dearest
    on, without which the run fits as well.
    """
    taken: list[Change] = []
    total = situation.total({})
    for _ in range(MAX_CHANGES):
        if total <= situation.limit:
            break
        step = _next_step(situation, taken, total)
        if step is None:
            break
        taken.append(step[0])
        total = step[1]
    taken = [one for place, one in enumerate(taken) if not _goes_on(one, taken[place + 1 :])]
    if total <= situation.limit:
        for change in taken[-2::-1]:
            fewer = [one for one in taken if one is not change]
            if situation.total(_merge(fewer)) <= situation.limit:
                taken = fewer
    needed = [situation.total(_merge(taken[: count + 1])) for count in range(len(taken))]
    return list(zip(taken, needed, strict=True)), needed[-1] if needed else total


def _next_step(situation: Situation, taken: list[Change], total: int) -> tuple[Change, int] | None:
    """The cheapest change that lowers memory by a hundredth at least."""
    in_force = _in_force(situation, _merge(taken))
    for change in changes(in_force):
        needed = situation.total(_merge([*taken, change]))
        if needed < 0.99 * total:
            return change, needed
    return None


def _in_force(situation: Situation, overrides: Mapping[str, Any]) -> dict[str, Any]:
    resolved = situation.with_options(overrides)
    sections = dump(resolved)
    flat = {
        name: value for part in sections.values() if isinstance(part, dict) for name, value in part.items()
    }
    sampling = situation.setup(resolved).sampling
    at_once = {"max_num_seqs": sampling.slots} if sampling is not None else {}
    return {**flat, **at_once, "device": situation.device.kind}


def _goes_on(change: Change, later: list[Change]) -> bool:
    """A later step down the same rung says it all."""
    return any(change.overrides.keys() <= other.overrides.keys() for other in later)


def _merge(taken: list[Change]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for change in taken:
        merged.update(change.overrides)
    return merged


def _flags(overrides: Mapping[str, Any]) -> str:
    """As they are pasted."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"--{name} {words.get(value, value) if isinstance(value, bool) else value}"
        for name, value in overrides.items()
    )
