"""Runs inside the toolchain gptqmodel: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), one layer after another.

Imports nothing of swift. ``main`` takes and returns JSON.
"""

from __future__ import annotations

import re
import resource
from typing import Any


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """Quantise ``model`` into ``output``.

    Args:
        payload: ``model``, ``output`` and ``scratch`` (folders; finished layers go to the last, so that memory holds
            one layer), ``method``, ``bits``, ``group_size``, ``rows`` (token ids), ``batch_size``, ``exclude`` (full
            names of modules), ``lm_head``, ``device``, ``dtype``, ``trust_remote_code``, ``num_threads``.

    Returns:
        ``resumable``: whether finished layers survive a kill; ``peak_bytes``: largest resident memory.
    """
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    if payload["num_threads"]:
        torch.set_num_threads(payload["num_threads"])
    config = QuantizeConfig(
        bits=payload["bits"],
        group_size=payload["group_size"],
        method=payload["method"],
        format="gptq" if payload["method"] == "gptq" else "gemm",
        # AWQ's zero points are what its kernels read; GPTQ's symmetric form is what Marlin kernels read.
        sym=payload["method"] == "gptq",
        lm_head=payload["lm_head"],
        dynamic={f"-:^{re.escape(name)}$": {} for name in payload["exclude"]} or None,
        device=payload["device"],
        offload_to_disk=True,
        offload_to_disk_path=payload["scratch"] + "/offload",
    )
    model = GPTQModel.load(
        payload["model"],
        config,
        dtype=getattr(torch, payload["dtype"]),
        trust_remote_code=payload["trust_remote_code"],
    )
    checkpoint = _checkpoint(model, payload["scratch"] + "/layers")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in payload["rows"]]
    batch_size = payload["batch_size"] if payload["batch_size"] > 0 else len(rows)
    extra = {"checkpoint": checkpoint} if checkpoint is not None else {}
    model.quantize(rows, batch_size=batch_size, calibration_data_min_length=1, **extra)
    model.save(payload["output"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resumable": checkpoint is not None, "peak_bytes": peak}


def _checkpoint(model: Any, folder: str) -> Any:
    """What lets a killed run go on with the next layer, where the library can do that for this model; else None."""
    from gptqmodel.looper.checkpoint_store import CheckpointConfig
    from gptqmodel.looper.gptq_checkpoint import validate_checkpoint_support

    try:
        validate_checkpoint_support(model)
    except (NotImplementedError, ValueError) as error:
        print(f"finished layers are not kept: {error}", flush=True)
        return None
    return CheckpointConfig(path=folder)
