"""Gradients of several runs at once: K adapters on one frozen base, which computes every layer once for all of them.

A fused micro-step holds the next micro-batch of every member: its rows stand one member after another, padded on the
right to the longest, and no row belongs to two members. The backbone runs once over all rows; every layer adds each
member's low-rank part to its own rows (`swift.tuners.lora`). Then each member's objective gets its own targets with its
own denominators. What is differentiated is the sum of the members' losses: nothing of one depends on parameters of
another, so their gradients are those of separate runs.

With several processes each has its own micro-batches of every member, on a copy of the base or in shards of it; the
members' adapters are whole everywhere, and their gradients are added up one member after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.data.collate import Batch
from swift.objectives.base import Denominators, Objective, TokenOutputs
from swift.parallel.engine import StepOutput, add_sums
from swift.parallel.native import NativeEngine
from swift.tuners.switch import AdapterSwitch, Draw

__all__ = ["MemberStep", "clear_gradients", "fused_gradients", "join_rows"]


@dataclass(frozen=True)
class MemberStep:
    """One optimizer step of a member.

    Attributes:
        adapter: its name on the shared model.
        engine: over the shared model, with the member's parameters.
        batches: its micro-batches, as many as it likes.
        seed: of its dropout.
    """

    adapter: str
    engine: NativeEngine
    batches: Sequence[Batch]
    objective: Objective
    seed: int | None = None


def fused_gradients(steps: Sequence[MemberStep], switch: AdapterSwitch) -> list[StepOutput]:
    """``forward_backward`` of every member; a fused micro-step holds the members that have so many micro-batches."""
    for step in steps:
        step.engine.average(False)
    steps[0].engine.model.train()
    counts = [step.engine.count(step.objective, step.batches) for step in steps]
    losses: list[list[Tensor]] = [[] for _ in steps]
    metrics: list[dict[str, Tensor]] = [{} for _ in steps]
    for number in range(max(len(step.batches) for step in steps)):
        present = [member for member, step in enumerate(steps) if number < len(step.batches)]
        parts = [steps[member] for member in present]
        batches = [step.batches[number].to(step.engine.device) for step in parts]
        joined = join_rows(batches)
        with _acting(switch, parts, batches, number, joined.input_ids.shape[1]):
            scaled = []
            outputs = _outputs(switch, parts, batches, joined)
            for member, step, batch, tokens in zip(present, parts, batches, outputs, strict=True):
                loss, sums = _loss(switch, step, batch, tokens, counts[member].denominators)
                scaled.append(step.engine.scaler.scale(loss) if step.engine.scaler else loss)
                losses[member].append(loss.detach())
                add_sums(metrics[member], sums)
            torch.autograd.backward(scaled)
            del scaled, outputs, tokens, loss, sums  # see `NativeEngine.forward_backward`
    for step in steps:
        if step.engine.ranks is not None:
            step.engine.ranks.finish()
    return [
        StepOutput(torch.stack(parts).sum(), sums, count)
        for parts, sums, count in zip(losses, metrics, counts, strict=True)
    ]


def clear_gradients(steps: Sequence[MemberStep]) -> None:
    """Forget what a micro-step that failed has left."""
    for step in steps:
        for group in step.engine.parameter_sets.values():
            group.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _acting(
    switch: AdapterSwitch, steps: Sequence[MemberStep], batches: Sequence[Batch], number: int, width: int
) -> Iterator[None]:
    """Each member's adapter and dropout on its rows, in the forward pass, the backward pass and what it recomputes."""
    rows = [(step.adapter, batch.input_ids.shape[0]) for step, batch in zip(steps, batches, strict=True)]
    draws = {
        step.adapter: Draw(
            step.seed,
            step.engine.ranks.number(number) if step.engine.ranks else number,
            (batch.input_ids.shape[1], width),
        )
        for step, batch in zip(steps, batches, strict=True)
        if step.seed is not None
    }
    with switch.mixed(rows), switch.drawing(draws):
        yield


def _outputs(
    switch: AdapterSwitch, steps: Sequence[MemberStep], batches: Sequence[Batch], joined: Batch
) -> list[TokenOutputs]:
    """What the model says of each member's targets."""
    ranks = steps[0].engine.ranks
    if ranks is None:
        return _computed(switch, steps, batches, joined)

    def work() -> tuple[Tensor, ...]:
        found = _computed(switch, steps, batches, joined)
        return tuple(field for one in found for field in (one.logprobs, one.is_argmax))

    fields = ranks.compute(work)
    return [TokenOutputs(*pair) for pair in zip(fields[::2], fields[1::2], strict=True)]


def _computed(
    switch: AdapterSwitch, steps: Sequence[MemberStep], batches: Sequence[Batch], joined: Batch
) -> list[TokenOutputs]:
    """Heads without an adapter are run once for all."""
    first = steps[0].engine
    with first.precision():
        states = first.states(joined)
        sizes = [batch.num_targets for batch in batches]
        targets = joined.targets[joined.targets != -100]
        if any(step.engine.has_own_head for step in steps):
            found = []
            parts = zip(steps, states.split(sizes), targets.split(sizes), strict=True)
            for step, own_states, own_targets in parts:
                with switch.use(step.adapter):
                    found.append(step.engine.of_states(own_states, own_targets))
            return found
        everything = first.of_states(states, targets)
    pairs = zip(everything.logprobs.split(sizes), everything.is_argmax.split(sizes), strict=True)
    return [TokenOutputs(*pair) for pair in pairs]


def _loss(
    switch: AdapterSwitch, step: MemberStep, batch: Batch, tokens: TokenOutputs, denominators: Denominators
) -> tuple[Tensor, dict[str, Tensor]]:
    with switch.use(step.adapter):  # a preference asks its reference, which is the base or other weights
        return step.objective(step.engine.objective_inputs(batch, tokens), batch, denominators)


def join_rows(batches: Sequence[Batch]) -> Batch:
    """One batch for the forward pass: all rows, padded on the right to the longest, where nothing is learned.

    In rows of several documents the padding is one more document; in others it goes on counting, as it does in
    `swift.data.layout`.
    """
    if any(batch.document_continues is not None for batch in batches):
        raise ValueError("rows whose documents continue one another cannot be joined")
    width = max(batch.input_ids.shape[1] for batch in batches)
    packed = any(batch.document_lengths is not None for batch in batches)
    ids, positions, targets, documents = [], [], [], []
    for batch in batches:
        rows, own = batch.input_ids.shape
        more = width - own
        ids.append(F.pad(batch.input_ids, (0, more)))
        targets.append(F.pad(batch.targets, (0, more), value=-100))
        start = 0 if batch.document_lengths is not None else own
        padding = torch.arange(start, start + more, device=batch.input_ids.device).expand(rows, more)
        positions.append(torch.cat([batch.position_ids, padding], 1))
        lengths = batch.document_lengths or [[own + more] for _ in range(rows)]
        if batch.document_lengths is not None and more:
            lengths = [[*row, more] for row in lengths]
        documents += lengths
    return Batch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions),
        targets=torch.cat(targets),
        weights=None,
        document_lengths=documents if packed else None,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=sum(batch.num_targets for batch in batches),
        sample_ids=[],
        samples_per_row=[],
    )
