"""Proof at start that documents in one row cannot see each other on this very model."""

from __future__ import annotations

import torch

from swift.core.errors import ConfigError
from swift.data.collate import Batch
from swift.parallel.native import NativeEngine

__all__ = ["check_isolation"]

LENGTHS = (5, 7)


@torch.no_grad()
def check_isolation(engine: NativeEngine) -> None:
    """Compare what is read of the second document (log-probabilities, scores, vectors) behind two first documents.

    Costs three forward passes of a dozen tokens. Raises ConfigError when they differ, as they do for recurrent
    layers and for attention that ignores document borders.
    """
    vocabulary = _vocabulary(engine)
    engine.model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, sum(LENGTHS)), generator=generator)
    changed = tokens.clone()
    changed[0, : LENGTHS[0]] = (tokens[0, : LENGTHS[0]] + 1 + vocabulary // 2) % vocabulary
    first, second = (engine.values(_packed(ids).to(engine.device)) for ids in (tokens, changed))
    alone = engine.values(_single(tokens[:, LENGTHS[0] :]).to(engine.device))
    rounding = 0.02 if engine.dtype in (torch.bfloat16, torch.float16) else 1e-4
    leak = (first - second).abs().max().item()
    difference = (first - alone).abs().max().item()
    if leak > rounding / 10 or difference > rounding * max(1.0, alone.abs().max().item()):
        raise ConfigError(
            "this model cannot keep packed documents apart",
            where="--packing / --padding_free",
            why=f"what is read of a document changes by up to {max(leak, difference):.2g} with its neighbour",
            fix="leave packing out (samples are grouped by length then), or choose another --attn_impl",
        )


def _vocabulary(engine: NativeEngine) -> int:
    embedding = engine.model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _packed(tokens: torch.Tensor) -> Batch:
    """Two documents in one row; the targets are those of the second."""
    start, width = LENGTHS[0], sum(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    targets = torch.full_like(tokens, -100)
    targets[0, start : width - 1] = tokens[0, start + 1 :]
    return Batch(tokens, positions, targets, None, [list(LENGTHS)], width, LENGTHS[1] - 1, [0, 1], [2])


def _single(tokens: torch.Tensor) -> Batch:
    width = tokens.shape[1]
    targets = torch.full_like(tokens, -100)
    targets[0, : width - 1] = tokens[0, 1:]
    return Batch(tokens, torch.arange(width)[None], targets, None, None, width, width - 1, [0], [1])
