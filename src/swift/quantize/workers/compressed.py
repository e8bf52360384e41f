"""Runs inside the toolchain llmcompressor: FP8 and W8A8 in the format compressed-tensors.

Imports nothing of swift. ``main`` takes and returns JSON.
"""

from __future__ import annotations

import resource
from typing import Any


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """Quantise ``model`` into ``output``.

    fp8: weights to float8 with a scale for each row, activations when they are computed (no calibration). w8a8: weights
    to int8 by GPTQ (arXiv 2210.17323), one layer after another, activations as with fp8.

    Args:
        payload: ``model`` and ``output`` (folders), ``method``, ``rows`` (token ids), ``exclude`` (full names of
            modules), ``device``, ``dtype``, ``trust_remote_code``, ``num_threads``.

    Returns:
        ``peak_bytes``: largest resident memory.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    if payload["num_threads"]:
        torch.set_num_threads(payload["num_threads"])
    model = AutoModelForCausalLM.from_pretrained(
        payload["model"],
        dtype=getattr(torch, payload["dtype"]),
        local_files_only=True,
        trust_remote_code=payload["trust_remote_code"],
    )
    if payload["method"] == "fp8":
        recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=payload["exclude"])
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    else:
        recipe = GPTQModifier(targets="Linear", scheme="W8A8", ignore=payload["exclude"])
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in payload["rows"]]
        oneshot(
            model=model,
            recipe=recipe,
            dataset=Dataset.from_list(rows),
            num_calibration_samples=len(rows),
            max_seq_length=max(map(len, payload["rows"])),
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
    model.config.use_cache = True
    model.save_pretrained(payload["output"], save_compressed=True)
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
