"""What an engine does when its model is divided into stages: the same steps and outputs, through the pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swift.data.collate import Batch
from swift.objectives.base import Objective, TokenOutputs
from swift.parallel.engine import StepCounts, StepOutput, add_sums
from swift.parallel.sequence.context import Shard

if TYPE_CHECKING:
    from swift.parallel.native import NativeEngine
    from swift.parallel.pipeline import MicroBatch

__all__ = ["pipelined_outputs", "pipelined_step"]


def pipelined_step(
    engine: NativeEngine, batches: Sequence[Batch], objective: Objective, counts: StepCounts, seed: int | None
) -> StepOutput:
    """``forward_backward`` of a step. Micro-batches get the shape of the largest, and as many as the schedule needs."""
    ranks = engine.ranks
    assert ranks is not None and ranks.pipeline is not None
    pipeline = ranks.pipeline
    batches = engine.before_step([batch.to(engine.device) for batch in batches])
    cuts = ranks.alike(batches)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}

    def finish(number: int, hidden: Tensor) -> Tensor:
        if number >= len(batches):
            return hidden.sum() * 0
        tokens = engine.outputs_of(_targets(hidden, cuts[number]), cuts[number])
        loss, sums = objective(
            engine.objective_inputs(batches[number], tokens), batches[number], counts.denominators
        )
        losses.append(loss.detach())
        add_sums(metrics, sums)
        return loss

    @contextlib.contextmanager
    def around(number: int) -> Iterator[None]:
        with engine.drawing(seed, ranks.number(number)), engine.precision():
            yield

    work = [_work(engine, cut) for cut in cuts]
    pipeline.run(work + [work[-1]] * (pipeline.multiple(len(work)) - len(work)), finish, around)
    ranks.finish()
    known = (
        torch.stack(losses).sum().cpu() if losses else None,
        {name: value.cpu() for name, value in metrics.items()},
    )
    loss, sums = pipeline.from_last(known)
    return StepOutput(
        loss.to(engine.device), {name: value.to(engine.device) for name, value in sums.items()}, counts
    )


def pipelined_outputs(engine: NativeEngine, batch: Batch) -> TokenOutputs:
    """Log-probabilities of the batch's targets, without gradients; all stages get them."""
    ranks = engine.ranks
    assert ranks is not None and ranks.pipeline is not None
    cut = ranks.cut(batch)
    found: list[TokenOutputs] = []

    def finish(number: int, hidden: Tensor) -> Tensor:
        found.append(engine.outputs_of(_targets(hidden, cut), cut))
        return hidden.new_zeros(1)

    with engine.precision():
        ranks.pipeline.run_forward([_work(engine, cut)], finish)
    known = (found[0].logprobs.cpu(), found[0].is_argmax.cpu()) if found else None
    logprobs, is_argmax = ranks.pipeline.from_last(known)
    return TokenOutputs(logprobs.to(engine.device), is_argmax.to(engine.device))


def _work(engine: NativeEngine, cut: Shard) -> MicroBatch:
    from swift.parallel.pipeline import MicroBatch  # and all of FSDP, which one device does without

    return MicroBatch(cut.batch.input_ids, engine.inputs_of(cut.batch, cut.attention))


def _targets(hidden: Tensor, cut: Shard) -> Tensor:
    return hidden[cut.batch.targets != -100]
