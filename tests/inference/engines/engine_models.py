"""What the tests of engines share: prompts, lively models, and what a plain forward says."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import torch

from swift.models.load import ModelBundle


def lively(bundle: ModelBundle) -> ModelBundle:
    """Small random layers repeat the last token; larger ones make lively answers."""
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.mul_(12)
    return bundle


def prompts(count: int, vocab_size: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, rng.integers(1, longest)).tolist() for _ in range(count)]


@torch.no_grad()
def plain_logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """``[len(ids) - 1, vocab]``: what the model says about each token but the first."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test to its end, in at most five minutes."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 300))

    return run
