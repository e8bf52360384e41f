"""Randomness as a pure function of seed and step.

Every optimizer step starts by seeding all generators from (seed, step). Dropout and noise then do not depend on what
happened before (an evaluation, a crash, a resume), and a checkpoint needs no generator states: seed and step are the
state. See docs/decisions/004-randomness.md.
"""

from __future__ import annotations

import hashlib
import random

import numpy
import torch

__all__ = ["derived_seed", "seed_everything"]


def derived_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, from the run's seed and what the purpose is called."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, *path: int | str) -> None:
    """Seed python, numpy and torch (all devices) with ``derived_seed``."""
    value = derived_seed(seed, *path)
    random.seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)
