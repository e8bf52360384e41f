"""``--debug_mode``: what the first batch really is: tokens beside targets, and embedding statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swift.data.collate import Batch

__all__ = ["alignment_table", "embedding_statistics", "inspection_report"]


def alignment_table(batch: Batch, tokenizer: Any, *, max_tokens: int = 48) -> list[str]:
    """One line per token of the first row: position, token, what it must predict (``.`` for nothing)."""
    lines = [f"{'pos':>5} {'doc pos':>7}  {'token':<24} predicts"]
    ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    positions = batch.position_ids[0].tolist()
    for index in range(min(len(ids), max_tokens)):
        token = repr(tokenizer.decode([ids[index]]))
        target = "." if targets[index] == -100 else repr(tokenizer.decode([targets[index]]))
        lines.append(f"{index:>5} {positions[index]:>7}  {token:<24} {target}")
    if len(ids) > max_tokens:
        lines.append(f"  ... {len(ids) - max_tokens} more tokens in this row")
    return lines


@torch.no_grad()
def embedding_statistics(model: Any, batch: Batch) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and mean norm of the input embeddings, for learned and other positions."""
    embedded: Tensor = model.get_input_embeddings()(batch.input_ids).float()
    learned = batch.targets != -100
    statistics = {}
    for name, mask in (("learned", learned), ("context", ~learned)):
        rows = embedded[mask]
        if rows.numel():
            statistics[name] = {
                "tokens": float(rows.shape[0]),
                "mean": float(rows.mean()),
                "std": float(rows.std()),
                "mean_norm": float(rows.norm(dim=-1).mean()),
                "nonfinite": float((~torch.isfinite(rows)).sum()),
            }
    return statistics


def inspection_report(model: Any, batch: Batch, tokenizer: Any) -> str:
    """The text that ``--debug_mode`` prints before the first step."""
    rows, width = batch.input_ids.shape
    lines = [
        f"first batch: {rows} x {width} tokens, {batch.num_tokens} without padding, {batch.num_targets} learned",
        *alignment_table(batch, tokenizer),
        "input embeddings:",
    ]
    for name, values in embedding_statistics(model, batch).items():
        lines.append(f"  {name:<8} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    return "\n".join(lines)
