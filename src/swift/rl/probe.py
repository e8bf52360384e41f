"""Do sampler and trainer mean the same by a probability? If not, every ratio is wrong, and training goes astray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from swift.core.errors import SwiftError
from swift.parallel.answers import PolicyEngine
from swift.rl.trajectory import RolloutBatch, Trajectory

__all__ = ["default_limit", "probe"]


def default_limit(dtype: torch.dtype) -> float:
    """Mean difference of log-probabilities that rounding explains."""
    return 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-3


def probe(
    engine: PolicyEngine,
    batch: RolloutBatch,
    answers: Sequence[Trajectory],
    *,
    limit: float | None,
    where: str,
) -> float:
    """The mean difference of the log-probabilities of sampler and trainer.

    Raises SwiftError naming the cause when it is above ``limit`` (None: what rounding explains).
    """
    sampled = torch.from_numpy(np.concatenate([one.sampler_logprobs for one in answers]))
    limit = default_limit(engine.dtype) if limit is None else limit
    found = _difference(engine.frozen_values(batch, training=True), sampled)
    if found <= limit:
        return found
    raise SwiftError(
        f"sampler and trainer disagree: their log-probabilities differ by {found:.3g} on average",
        where=where,
        why=_cause(engine, batch, sampled, found),
        fix="if this is meant to be so: --max_mismatch with a larger number, and --mismatch token_truncate",
    )


def _difference(values: torch.Tensor, sampled: torch.Tensor) -> float:
    if not len(sampled):
        return 0.0
    found = float((values.float().cpu() - sampled).abs().mean())
    return found if found == found else float("inf")


def _cause(engine: PolicyEngine, batch: RolloutBatch, sampled: torch.Tensor, found: float) -> str:
    """What makes the difference go away is the cause."""
    if _difference(engine.frozen_values(batch), sampled) < found / 4:
        return "the model computes something else in training than in evaluation (dropout, noise)"
    if batch.temperature != 1 and (
        _difference(engine.frozen_values(replace(batch, temperature=1.0)), sampled) < found / 4
    ):
        return f"one of them does not divide its logits by the temperature {batch.temperature:g}"
    reference = engine.reference_logprobs(batch.to(engine.device))
    if reference is not None and _difference(reference, sampled) < found / 4:
        return "the sampler has the weights that training began with, not those of the newest update"
    if engine.dtype in (torch.bfloat16, torch.float16):
        return f"rounding in {str(engine.dtype).removeprefix('torch.')}, or other weights in the sampler"
    return "other weights in the sampler, or another attention"
