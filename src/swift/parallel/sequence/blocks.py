"""Attention of a block of queries to a block of keys, in pieces that can be merged: output and log-sum-exp.

The backward pass of a block takes output and log-sum-exp over *all* keys: with them the block's probabilities are
``exp(scores - logsumexp)``, and its share of the gradients is what flash attention's own backward pass computes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swift.core.logging import get_logger

__all__ = ["block_backward", "block_forward", "merge", "plain_backward", "plain_forward"]

logger = get_logger(__name__)

_SLOW = "ring attention computes whole blocks of scores: torch's flash kernel is of no use on this GPU"


def merge(output: Tensor, total: Tensor, part: Tensor, logsumexp: Tensor) -> None:
    """Add a block to ``output [..., width, channels]`` and ``total [..., width]`` (log-sum-exp so far), in place."""
    merged = torch.logaddexp(total, logsumexp.to(total.dtype))
    output.mul_((total - merged).exp_()[..., None])
    output.addcmul_(part.to(output.dtype), (logsumexp - merged).exp_()[..., None])
    total.copy_(merged)


def block_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``[rows, heads, width, channels]`` each (equal numbers of heads) -> output alike, log-sum-exp without channels.

    ``causal``: query i sees keys 0..i; both have the same width then.
    """
    if _flash(query):
        if query.is_cuda:
            output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, causal, False, scale=scale
            )
            return output, logsumexp
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, causal, scale=scale)
    return plain_forward(query, key, value, causal, scale)


def block_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of the gradients of query, key and value."""
    if _flash(query):
        if query.is_cuda:
            zero = torch.zeros((), dtype=torch.int64, device=query.device)
            widths = query.shape[2], key.shape[2]
            ends: Any = (None, None)
            return torch.ops.aten._scaled_dot_product_flash_attention_backward(
                gradient,
                query,
                key,
                value,
                output,
                logsumexp,
                *ends,
                *widths,
                0.0,
                causal,
                zero,
                zero,
                scale=scale,
            )
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(gradient, query, key, value, output, logsumexp, 0.0, causal, scale=scale)
    return plain_backward(gradient, query, key, value, output, logsumexp, causal, scale)


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`block_forward` by its formulas, for every device and precision."""
    scores = _scores(query, key, causal, scale)
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp_().to(value.dtype) @ value, logsumexp


def plain_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_backward` by its formulas."""
    high = logsumexp.dtype
    probabilities = (_scores(query, key, causal, scale) - logsumexp[..., None]).exp_()
    mean = (gradient.to(high) * output.to(high)).sum(-1, keepdim=True)
    slopes = probabilities * (gradient.to(high) @ value.to(high).mT - mean) * scale
    grad_value = probabilities.mT @ gradient.to(high)
    grads = slopes @ key.to(high), slopes.mT @ query.to(high), grad_value
    return tuple(grad.to(query.dtype) for grad in grads)  # type: ignore[return-value]


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    high = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(high) @ key.to(high).mT * scale
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(later, float("-inf"))


def _flash(query: Tensor) -> bool:
    if query.is_cuda:
        half = query.dtype in (torch.float16, torch.bfloat16)
        return (
            half
            and query.shape[-1] % 8 == 0
            and query.shape[-1] <= 256
            and _cuda_flash_is_right(query.device.index)
        )
    return query.device.type == "cpu"


@lru_cache(maxsize=16)
def _cuda_flash_is_right(device: int) -> bool:
    """Whether torch's flash kernel gives what the plain formulas give, on a small case of two merged blocks."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, 2, 32, 64)
    query, key, value, gradient = torch.randn(shape, generator=generator).to(f"cuda:{device}", torch.bfloat16)
    q, k, v, slope = (tensor.float() for tensor in (query, key, value, gradient))
    wanted = plain_forward(q, k, v, True, 0.125)
    try:
        with torch.inference_mode(False), torch.no_grad():
            found = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, True, False, scale=0.125
            )
            zero = torch.zeros((), dtype=torch.int64, device=query.device)
            given = gradient, query, key, value, found[0], found[1] + 1, None, None, 32, 32, 0.0, True
            slopes = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *given, zero, zero, scale=0.125
            )
    except (RuntimeError, TypeError, NotImplementedError) as error:
        logger.warning("%s; %s", _SLOW, error)
        return False
    expected = plain_backward(slope, q, k, v, wanted[0], wanted[1] + 1, True, 0.125)
    pairs = zip((*found[:2], *slopes), (*wanted, *expected), strict=True)
    is_right = all(torch.allclose(one.float(), other, atol=0.1, rtol=0.05) for one, other in pairs)
    if not is_right:
        logger.warning("%s; it gives other numbers", _SLOW)
    return is_right
