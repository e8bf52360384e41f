"""From rows and lengths to micro-batches, steps and warm-up; the same arithmetic as the trainer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swift.config.sections.training import TrainingSection
from swift.data.batching import BatchSchedule, Mode

__all__ = ["Epoch", "plan_epoch", "step_counts"]

_PACK_SAMPLES = 20_000


@dataclass(frozen=True)
class Epoch:
    """One pass over the data on one data-parallel rank.

    Attributes:
        micro_batches: forward passes.
        exact: False when lengths were sampled and decide the number.
        widest: tokens of its largest micro-batch, padding included.
        padding: share of the tokens that are padding.
        samples_per_row: samples that share a row (1 unless packed).
    """

    micro_batches: int
    exact: bool
    widest: int
    padding: float
    samples_per_row: float


def plan_epoch(
    lengths: Sequence[int],
    num_samples: int,
    *,
    batch_size: int,
    mode: Mode,
    max_length: int,
    group_by_length: bool,
    ranks: int = 1,
) -> Epoch:
    """The micro-batches of ``num_samples`` samples whose lengths are distributed like ``lengths``.

    Exact when ``lengths`` are those of all samples; else, for packed rows, in proportion to a packing of as many
    copies of the lengths as there are samples (20,000 at most).
    """
    exact = len(lengths) == num_samples
    copies = 1 if exact else max(1, min(num_samples, _PACK_SAMPLES) // len(lengths))
    schedule = BatchSchedule(
        list(lengths) * copies,
        batch_size=batch_size,
        mode=mode,
        max_length=max_length,
        group_by_length=group_by_length,
    )
    batches = schedule.micro_batches(0)
    widths = [_tokens(batch, schedule, mode, max_length) for batch in batches]
    if exact:
        count = len(batches)
    elif mode == "packed":
        count = math.ceil(len(batches) * num_samples / (len(lengths) * copies))
    else:
        count = math.ceil(num_samples / batch_size)
    rows = sum(len(batch) for batch in batches)
    return Epoch(
        micro_batches=math.ceil(count / ranks),
        exact=exact or mode != "packed",
        widest=max(widths),
        padding=1 - schedule.num_tokens / sum(widths),
        samples_per_row=len(schedule.lengths) / rows,
    )


def _tokens(batch: list[list[int]], schedule: BatchSchedule, mode: Mode, max_length: int) -> int:
    """Tokens of a micro-batch as a rectangle."""
    if mode == "packed":
        return len(batch) * max_length
    return len(batch) * max(int(schedule.lengths[row].sum()) for row in batch)


def step_counts(
    micro_batches: int, training: TrainingSection, per_epoch: int | None = None
) -> tuple[int, int, int]:
    """(steps of an epoch, all steps, warm-up steps).

    ``per_epoch``: where it is known; else the last step of an epoch may be smaller than the others.
    """
    if per_epoch is None:
        per_epoch = math.ceil(micro_batches / (training.gradient_accumulation_steps or 1))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    warmup = training.warmup_steps
    return per_epoch, total, math.ceil(total * training.warmup_ratio) if warmup is None else warmup
