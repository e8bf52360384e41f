"""Log-probabilities of target tokens straight from hidden states, without keeping full-vocabulary logits.

Each target's log-probability depends on one hidden row only, so its Jacobian is one row as well::

    logp_t = z_t[y_t] - logsumexp(z_t),  z_t = W h_t          d logp_t / d h_t = W[y_t] - softmax(z_t) W

With a frozen output matrix W the forward pass computes that row while the logits of a chunk exist; the backward
pass is one multiplication and the logits are never recomputed or kept. When W is trained, its gradient
``sum_t g_t (onehot(y_t) - softmax(z_t)) h_t^T`` needs the incoming gradient g, and the backward pass computes the
logits once more, chunk by chunk. Every loss (SFT, preference, policy) is a function of these log-probabilities.

The rows of W may lie on several ranks (`Vocabulary`): each makes the logits of its own rows, and of a chunk three
numbers for each target go round: maximum, sum of exponentials, logit of the target. The gradient of the hidden states
is then a rank's term of it, to be added up by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

__all__ = ["Vocabulary", "entropies", "linear_logprobs", "module_logprobs"]


@dataclass(frozen=True)
class Vocabulary:
    """Which part of the vocabulary a rank has.

    Attributes:
        first: id of the first token.
        group: the ranks that have the parts; None: this is all of it.
    """

    first: int = 0
    group: distributed.ProcessGroup | None = None

    def reduced(self, values: Tensor, how: Any = distributed.ReduceOp.SUM) -> Tensor:
        """Over all parts; in place."""
        if self.group is not None:
            distributed.all_reduce(values, how, group=self.group)
        return values

    def own(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Places of the targets among the ``size`` tokens of this part (0 of others), and which are of this part."""
        places = targets - self.first
        here = (places >= 0) & (places < size)
        return places.where(here, 0), here


_WHOLE = Vocabulary()


def _softmax_parts(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For a chunk ``[n, d]``: exp(z - max) ``[n, v]``, its row sums, z_t[y_t] - max, and argmax ``[n, 1]`` each."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maxima, argmax = logits.max(dim=-1, keepdim=True)
    if vocabulary.group is None:
        picked = logits.gather(1, targets[:, None]) - maxima
        exponentials = logits.sub_(maxima).exp_()
        return exponentials, exponentials.sum(dim=-1, keepdim=True), picked, argmax
    own = maxima.clone()
    vocabulary.reduced(maxima, distributed.ReduceOp.MAX)
    argmax = (argmax + vocabulary.first).where(own == maxima, torch.iinfo(torch.int64).max)
    vocabulary.reduced(argmax, distributed.ReduceOp.MIN)
    places, here = vocabulary.own(targets, weight.shape[0])
    picked = logits.gather(1, places[:, None]).sub_(maxima).where(here[:, None], 0)
    exponentials = logits.sub_(maxima).exp_()
    sums = vocabulary.reduced(torch.cat([exponentials.sum(dim=-1, keepdim=True), picked], 1))
    return exponentials, sums[:, :1], sums[:, 1:], argmax


def entropies(logits: Tensor, vocabulary: Vocabulary = _WHOLE) -> Tensor:
    """``[n, v]`` -> ``[n]``: entropies (nats) of the distributions."""
    maxima = vocabulary.reduced(logits.amax(1, keepdim=True), distributed.ReduceOp.MAX)
    shifted = logits - maxima
    exponentials = shifted.exp()
    # 0 times minus infinity counts as 0: no token, no surprise.
    products = torch.where(exponentials > 0, exponentials * shifted, 0)
    sums = vocabulary.reduced(torch.stack([exponentials.sum(1), products.sum(1)]))
    return sums[0].log() - sums[1] / sums[0]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk_size: int,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        compute_weight = weight.to(dtype)
        logprobs = torch.empty(
            hidden.shape[0], dtype=torch.promote_types(dtype, torch.float32), device=hidden.device
        )
        is_argmax = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        jacobian = torch.empty_like(hidden, dtype=dtype) if needs_hidden and not needs_weight else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk_targets = targets[rows]
            exponentials, sums, picked, argmax = _softmax_parts(
                hidden[rows].to(dtype), compute_weight, chunk_targets, vocabulary
            )
            logprobs[rows] = (picked - sums.log()).squeeze(1)
            is_argmax[rows] = argmax.squeeze(1) == chunk_targets
            if jacobian is not None:
                # Dividing by the sums after the product touches [n, d] numbers instead of [n, v].
                mean_row = (exponentials.to(dtype) @ compute_weight).div_(sums.to(dtype))
                places, here = vocabulary.own(chunk_targets, weight.shape[0])
                chosen = compute_weight.index_select(0, places)
                jacobian[rows] = (chosen if vocabulary.group is None else chosen.mul_(here[:, None])).sub_(
                    mean_row
                )
            del exponentials  # else it lives until the next chunk has its own
        saved = (hidden, weight) if needs_weight else (jacobian, None)
        ctx.save_for_backward(*saved, targets)
        ctx.dtype, ctx.chunk_size, ctx.hidden_dtype = dtype, chunk_size, hidden.dtype
        ctx.vocabulary = vocabulary
        ctx.mark_non_differentiable(is_argmax)
        return logprobs, is_argmax

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0][:, None]
        first, weight, targets = ctx.saved_tensors
        if weight is None:
            return (gradient.to(ctx.dtype) * first).to(ctx.hidden_dtype), *[None] * 5
        hidden, compute_weight = first, weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are summed in full precision: with bfloat16 many small terms would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            chunk, chunk_targets = hidden[rows].to(ctx.dtype), targets[rows]
            exponentials, sums, _, _ = _softmax_parts(chunk, compute_weight, chunk_targets, ctx.vocabulary)
            scale = gradient[rows].to(sums.dtype)
            places, here = ctx.vocabulary.own(chunk_targets, weight.shape[0])
            residual = exponentials.mul_(-scale / sums)
            residual = residual.scatter_add_(1, places[:, None], scale * here[:, None])
            residual = residual.to(ctx.dtype)
            grad_hidden[rows] = (residual @ compute_weight).to(hidden.dtype)
            grad_weight += residual.T @ chunk
            del exponentials, residual
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 4


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int = 1024,
    vocabulary: Vocabulary = _WHOLE,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` under ``softmax(hidden @ weight.T)``.

    Args:
        hidden: ``[n, d]`` hidden states at the positions that predict the targets.
        weight: ``[vocab, d]`` output matrix.
        targets: ``[n]`` token ids.
        chunk_size: positions whose logits ``[chunk_size, vocab]`` exist at the same time.
        vocabulary: which rows of the output matrix ``weight`` has.

    Returns:
        logprobs ``[n]`` (float32, or float64 for float64 inputs; differentiable with respect to hidden and
        weight) and whether each target is the likeliest token ``[n]`` (bool).
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(
            hidden, weight, targets, dtype, chunk_size, vocabulary
        )
    return result


def module_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """As `linear_logprobs`, for any output head (bias, adapter, soft-capping): chunks are recomputed backwards."""

    def chunk_logprobs(chunk: Tensor, chunk_targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = logits.log_softmax(dim=-1).gather(1, chunk_targets[:, None]).squeeze(1)
        return picked, logits.argmax(dim=-1) == chunk_targets

    parts = [
        checkpoint(chunk_logprobs, rows, row_targets, use_reentrant=False)
        for rows, row_targets in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    if not parts:
        empty = hidden.sum() * 0
        return empty.expand(0), torch.empty(0, dtype=torch.bool, device=hidden.device)
    logprobs, is_argmax = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(is_argmax)
