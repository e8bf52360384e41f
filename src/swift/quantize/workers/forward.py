"""Runs inside a toolchain: the logits of a quantised folder, computed by the library that made it.

Imports nothing of swift. ``main`` takes and returns JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """Write ``NNNNNN.safetensors`` with ``logits [tokens, vocabulary]`` for each text, in order.

    Args:
        payload: ``model`` (folder), ``probes`` (lists of token ids), ``output`` (folder), ``device``, ``dtype``,
            ``loader`` (``gptqmodel`` or ``transformers``), ``trust_remote_code``, ``num_threads``.
    """
    import torch
    from safetensors.torch import save_file

    if payload["num_threads"]:
        torch.set_num_threads(payload["num_threads"])
    model = _load(payload).eval()
    with torch.inference_mode():
        for number, ids in enumerate(payload["probes"]):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            save_file(
                {"logits": logits.cpu().contiguous()}, Path(payload["output"]) / f"{number:06d}.safetensors"
            )
    return {
        "layers": sorted(
            {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
        )
    }


def _load(payload: dict[str, Any]) -> Any:
    import torch

    dtype = getattr(torch, payload["dtype"])
    if payload["loader"] == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        # Its layers load in 16 bits only; made float32 afterwards they compute in it, from the same scales.
        model = GPTQModel.load(
            payload["model"],
            device=payload["device"],
            backend=BACKEND.TORCH if payload["device"] == "cpu" else BACKEND.AUTO,
            dtype=torch.float16 if dtype is torch.float32 else dtype,
            trust_remote_code=payload["trust_remote_code"],
        )
        return model.model.float() if dtype is torch.float32 else model.model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        payload["model"],
        dtype=dtype,
        device_map={"": payload["device"]},
        local_files_only=True,
        trust_remote_code=payload["trust_remote_code"],
    )
