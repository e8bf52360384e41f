"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["learning_rate_schedule"]


def _constant(progress: float, decay_ratio: float) -> float:
    """1 after warm-up."""
    return 1.0


def _linear(progress: float, decay_ratio: float) -> float:
    """From 1 to 0."""
    return 1.0 - progress


def _cosine(progress: float, decay_ratio: float) -> float:
    """Half a cosine from 1 to 0 (SGDR without restarts, arXiv 1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _warmup_stable_decay(progress: float, decay_ratio: float) -> float:
    """1, then a linear fall to 0 over the last ``decay_ratio`` of the run (MiniCPM, arXiv 2404.06395)."""
    return min(1.0, (1.0 - progress) / decay_ratio)


_SHAPES = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}
"""The share of the peak at (share of the run done after warm-up, ``lr_decay_ratio``), by ``lr_scheduler_type``."""


def learning_rate_schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    min_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> Callable[[int], float]:
    """The learning rate of the update after ``step`` completed updates.

    Warm-up rises linearly from 0 over ``warmup_steps``; then the named shape runs from 1 to ``min_ratio`` of the
    peak over the remaining steps. With ``min_ratio`` 0 this equals transformers' schedules step by step.
    """
    shape = _SHAPES[name]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * (min_ratio + (1.0 - min_ratio) * shape(min(1.0, progress), decay_ratio))

    return rate
