"""Runs inside the toolchain vllm: load a folder and take one token from it. Imports nothing of swift."""

from __future__ import annotations

from typing import Any


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """``model``: folder, ``ids``: a prompt, ``dtype``. Returns the token that came."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=payload["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(payload["ids"]) + 8,
        dtype=payload["dtype"],
    )
    prompt = {"prompt_token_ids": payload["ids"]}
    (answer,) = engine.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return {"token": answer.outputs[0].token_ids[0]}
