"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while training.

``x + (alpha / sqrt(L d)) * U(-1, 1)`` with L the length of the sequence and d the embedding width. With several
documents in a row, L is the length of the token's own document; padding does not count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swift.data.collate import Batch
from swift.parallel.native import NativeEngine

__all__ = ["add_embedding_noise", "token_lengths"]


def token_lengths(batch: Batch, pad_token_id: int) -> Tensor:
    """For each token the length of its document, ``[rows, width]`` float32."""
    rows, width = batch.input_ids.shape
    if batch.document_lengths is None:
        real = batch.input_ids != pad_token_id
        lengths = real.flip(1).cummax(1).values.sum(1, keepdim=True)
        return lengths.clamp(min=1).expand(rows, width).float()
    counts = [torch.repeat_interleave(torch.tensor(row), torch.tensor(row)) for row in batch.document_lengths]
    return torch.stack(counts).float().to(batch.input_ids.device)


def add_embedding_noise(engine: NativeEngine, alpha: float, pad_token_id: int) -> RemovableHandle:
    """Install the noise on the engine's model; it acts only inside ``forward_backward``."""

    def noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        batch = engine.training_batch
        if batch is None:
            return output
        scale = alpha / (token_lengths(batch, pad_token_id) * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output.dtype)

    model: Any = engine.model
    embeddings: nn.Module = model.get_input_embeddings()
    return embeddings.register_forward_hook(noise)
