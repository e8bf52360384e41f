"""A model's head apart from the rest: so that a loss can avoid the full logits, and to read values of whole texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swift.models.classifier import SCORE

__all__ = ["answer_difference", "split_backbone", "split_head", "split_like_small", "split_score"]


def split_head(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """(backbone, lm_head) with ``lm_head(backbone(input_ids=x).last_hidden_state) == model(input_ids=x).logits``.

    The equation is tried on the loaded model with four tokens, in evaluation mode. A model that does anything else
    between hidden states and logits (soft-capping, a scale) gives None, as does one without the usual parts. Both
    share the model's parameters; tied heads work alike.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    head = get_head() if get_head is not None else None
    if not isinstance(head, nn.Module) or not isinstance(backbone, nn.Module) or backbone is model:
        return None
    embedding = model.get_input_embeddings()
    tokens = torch.arange(4, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = backbone(input_ids=tokens, use_cache=False)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                return None
            ours, theirs = head(hidden), model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(was_training)
    # Not equal bit for bit: some models compute fewer positions in another order.
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if not same or not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max())):
        return None
    return backbone, head


def split_like_small(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """`split_head` of a model without weights, tried on a small one of random weights with the same configuration."""
    from swift.models.shrink import TinySizes, shrunk_copy

    embedding = model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        small = type(model)._from_config(shrunk_copy(model.config, TinySizes()), dtype=embedding.dtype)
    if split_head(small.eval()) is None:
        return None
    return getattr(model, model.base_model_prefix), model.get_output_embeddings()


def split_score(model: Any) -> tuple[nn.Module, nn.Module]:
    """Backbone and score head of a sequence classifier."""
    return getattr(model, model.base_model_prefix), getattr(model, SCORE)


def split_backbone(model: Any) -> tuple[nn.Module, nn.Module]:
    """The backbone of a causal model, whose hidden states are the vectors, and a head that changes nothing."""
    return getattr(model, model.base_model_prefix), nn.Identity()


def answer_difference(positive: int, negative: int) -> Callable[[Tensor], Tensor]:
    """``logit(positive) - logit(negative)``, ``[n, vocab] -> [n, 1]``: the log-odds of the two answers."""

    def read(logits: Tensor) -> Tensor:
        return (logits[:, positive] - logits[:, negative])[:, None]

    return read
