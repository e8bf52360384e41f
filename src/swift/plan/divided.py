"""What a trace of one process says of one of several."""

from __future__ import annotations

from collections.abc import Mapping

from swift.core.errors import ModelError
from swift.models.facts import ModelFacts
from swift.plan.analytic import Setup, gathered_bytes

__all__ = ["divided"]

_RESTING = ("weights", "adapters", "optimizer", "gradients")


def divided(phases: Mapping[str, Mapping[str, int]], facts: ModelFacts, setup: Setup) -> dict[str, int]:
    """Bytes by part at the peak.

    Shards of what rests, activations of this rank's tokens; and by the formulas what is gathered in each phase.

    Args:
        phases: of one process, with the micro-batch of a rank.

    Raises:
        ModelError: master weights in another precision than the computation's, in shards: they are cast on the way.
    """
    if setup.shards > 1 and not setup.is_lora and setup.trainable_bytes > setup.compute_bytes:
        raise ModelError(
            "full training in shards, whose weights are cast as they are gathered, cannot be traced",
            fix="leave out --exact: the formulas know it",
        )
    found = [_of_rank(phase, parts, facts, setup) for phase, parts in phases.items()]
    return max(found, key=lambda parts: sum(parts.values()))


def _of_rank(phase: str, parts: Mapping[str, int], facts: ModelFacts, setup: Setup) -> dict[str, int]:
    result = {part: float(size) for part, size in parts.items()}
    for part in _RESTING:
        result[part] = result.get(part, 0) / setup.resting_shares
    result["activations"] = result.get("activations", 0) / setup.sequence_shares
    samples = phase.startswith("sampling")
    whole = setup.sampling.gathered if samples and setup.sampling else gathered_bytes(facts, setup)
    result["temporary"] = result.get("temporary", 0) + (0 if phase == "update" else whole)
    return {part: round(size) for part, size in result.items()}
