"""The native engine for preferences: what is read of a sequence is the log-probability of its answer.

The logits of a few tokens exist at a time, as in supervised fine-tuning; of the reference nothing is kept but one
number for each answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from swift.data.collate import Batch
from swift.models.sharded import local
from swift.objectives.base import PooledOutputs, TokenOutputs
from swift.parallel.native import NativeEngine

__all__ = ["AnswerEngine", "PolicyEngine", "other_weights"]

Reference = Callable[[], contextlib.AbstractContextManager[Any]]


class AnswerEngine(NativeEngine):
    """Values of answers, ``[num_sequences, 4 or 5]``, see ``objectives/preference/objective.py``.

    Args:
        reference: a context in which the model is the reference; None: there is none, or the batches bring its
            log-probabilities.
        reference_engine: an engine of a reference model of its own, instead.
        ld_alpha: weight of the tokens of a pair's longer answer behind the length of the shorter one (LD-DPO).
        mismatched: add the column of mismatched pairs (KTO).
    """

    def __init__(
        self,
        *args: Any,
        reference: Reference | None = None,
        reference_engine: NativeEngine | None = None,
        ld_alpha: float | None = None,
        mismatched: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.reference, self.reference_engine = self._of_parts(reference), reference_engine
        self.ld_alpha, self.mismatched = ld_alpha, mismatched

    def _of_parts(self, reference: Reference | None) -> Reference | None:
        """Where the model has been divided since: this rank's parts of the other weights, for its own parts."""
        if self.ranks is None or not isinstance(reference, partial) or reference.func is not other_weights:
            return reference
        from swift.parallel.states import shared

        parameters, weights = reference.args
        trained = {
            name: parameter
            for one in self.parameter_sets.values()
            for name, parameter in one.parameters.items()
        }
        if parameters.keys() == trained.keys() and not any(map(_is_part, trained.values())):
            return reference
        parts = {name: shared(weights[name], trained[name]) for name in parameters if name in trained}
        return partial(other_weights, trained, parts, self.ranks.free)

    @torch.no_grad()
    def predict(self, batch: Batch) -> PooledOutputs:
        """The values of a batch, in evaluation mode."""
        self.model.eval()
        self.average(True)
        return self.objective_inputs(batch.to(self.device))

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """``[num_targets]`` under the reference; None without one."""
        if self.reference_engine is not None:
            self.reference_engine.model.eval()
            return self.reference_engine.token_outputs(batch).logprobs
        if self.reference is None:
            return None
        training = self.model.training
        self.model.eval()  # no dropout
        try:
            with self.reference():
                return self.token_outputs(batch).logprobs
        finally:
            self.model.train(training)

    def reference_sums(self, batch: Batch) -> Tensor:
        """``[num_sequences]``: log-probabilities of the answers under the reference; 0 without one."""
        if batch.reference is not None:
            return batch.reference
        logprobs = self.reference_logprobs(batch)
        if logprobs is None:
            return torch.zeros(len(batch.target_counts or []), device=self.device)
        return self._sums(logprobs, batch, self.ld_alpha)

    def before_step(self, batches: Sequence[Batch]) -> list[Batch]:
        return [
            replace(
                batch,
                reference=self.reference_sums(batch),
                mismatched_ratios=self._mismatched_ratios(batch) if self.mismatched else None,
            )
            for batch in batches
        ]

    def objective_inputs(self, batch: Batch, tokens: TokenOutputs | None = None) -> PooledOutputs:
        mismatched = self._mismatched_ratios(batch) if self.mismatched else None
        reference = self.reference_sums(batch)
        logprobs = (tokens or self.token_outputs(batch)).logprobs
        plain = self._sums(logprobs, batch, None)
        policy = plain if self.ld_alpha is None else self._sums(logprobs, batch, self.ld_alpha)
        lengths = torch.tensor(batch.target_counts or [], device=self.device)
        columns = [policy, reference.to(policy.dtype), lengths.to(policy.dtype), plain]
        if mismatched is not None:
            columns.append(mismatched.to(policy.dtype))
        return PooledOutputs(torch.stack(columns, 1))

    @torch.no_grad()
    def _mismatched_ratios(self, batch: Batch) -> Tensor:
        """Log-ratios of questions with answers to others, ``[num_sequences]``; 0 where a batch has one sequence."""
        if batch.mismatched_ratios is not None:
            return batch.mismatched_ratios
        other = batch.mismatched
        if other is None:
            return torch.zeros(len(batch.target_counts or []), device=self.device)
        policy = self._sums(self.token_outputs(other).logprobs, other, None)
        return policy - self.reference_sums(other)

    @staticmethod
    def _sums(logprobs: Tensor, batch: Batch, ld_alpha: float | None) -> Tensor:
        """Sums over the targets of each sequence; sequences 2i and 2i + 1 are a pair where ``ld_alpha`` is given."""
        counts = batch.target_counts or []
        if not counts:
            return logprobs.sum()[None][:0]
        # Not index_add, whose order of additions is not the same every time on a GPU.
        table = pad_sequence(list(logprobs.split(counts)), batch_first=True)
        if ld_alpha is not None:
            shared = torch.tensor([min(counts[at & ~1], counts[at | 1]) for at in range(len(counts))])
            behind = torch.arange(table.shape[1])[None] >= shared[:, None]
            table = torch.where(behind.to(table.device), table * ld_alpha, table)
        return table.sum(1)


class PolicyEngine(AnswerEngine):
    """The native engine for policy optimisation: every token of an answer is read."""

    def objective_inputs(  # type: ignore[override]
        self, batch: Batch, tokens: TokenOutputs | None = None
    ) -> TokenOutputs:
        return self.token_outputs(batch) if tokens is None else tokens

    @torch.no_grad()
    def frozen_values(self, batch: Batch, *, training: bool = False) -> Tensor:
        """Log-probabilities of the batch's targets without gradients ``[num_targets]``; the mode is left as it was."""
        before = self.model.training
        self.model.train(training)
        try:
            return self.token_outputs(batch.to(self.device)).logprobs
        finally:
            self.model.train(before)


def _is_part(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "placements")


@contextlib.contextmanager
def other_weights(
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    forget: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Let the parameters have other values within the block; for passes without gradients.

    ``forget``: of parameters that are shards, lets go of what has been gathered of them. Their memory stays where it
    is, because FSDP has an eye on it.
    """
    if forget is not None:
        with _other_shards(parameters, weights, forget):
            yield
        return
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


@contextlib.contextmanager
def _other_shards(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], forget: Callable[[], None]
) -> Iterator[None]:
    kept = {name: local(parameters[name].detach()).clone() for name in weights}

    def take(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                local(parameters[name].detach()).copy_(local(value))
        forget()

    try:
        take(weights)
        yield
    finally:
        take(kept)
