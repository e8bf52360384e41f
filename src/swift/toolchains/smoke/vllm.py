"""Lets a tiny random model write eight tokens with vLLM, twice the same."""

import os
import tempfile
from pathlib import Path

from tiny_model import make_model

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def main(payload: dict) -> dict:
    from vllm import LLM, SamplingParams, __version__

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        model = LLM(
            folder, dtype="float32", enforce_eager=True, max_model_len=128, gpu_memory_utilization=0.2
        )
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        prompts = [{"prompt_token_ids": [3, 4, 5]}] * 2
        one, two = [list(answer.outputs[0].token_ids) for answer in model.generate(prompts, sampling)]
    if len(one) != 8 or one != two:
        raise ValueError(f"expected the same eight tokens twice, got {one} and {two}")
    return {"vllm": __version__, "tokens": one}
