"""Runs inside the toolchain vllm: load a folder and take one token from it. Imports nothing of swift."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM reads it when it is imported
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """``model``: folder, ``ids``: a prompt, ``bytes``: size of its weights. Returns the token that came."""
    import torch
    from vllm import LLM, SamplingParams

    share = 0.9
    if (
        not torch.cuda.is_available()
    ):  # on a CPU vLLM wants its share of all memory free; weights and cache will do
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = min(share, max(0.2, (2 * payload["bytes"] + (2 << 30)) / memory))
    engine = LLM(
        model=payload["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(payload["ids"]) + 8,
        gpu_memory_utilization=share,
    )
    prompt = {"prompt_token_ids": payload["ids"]}
    (answer,) = engine.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return {"token": answer.outputs[0].token_ids[0]}
