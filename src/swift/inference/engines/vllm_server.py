"""How vLLM's server is started: its words, its variables, what it must know of adapters beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from swift.config.sections.vllm import VllmSection
from swift.core.errors import ModelError
from swift.toolchains.toolchain import Toolchain

__all__ = ["BASE", "adapter_rank", "lora_rank", "server_arguments", "server_variables"]

BASE = "base"
"""What the base model is called inside the server."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told as the highest rank."""
MAX_CPU_CACHE_GIB = 8.0


def server_arguments(
    section: VllmSection,
    model: Path,
    socket: Path,
    adapters: Mapping[str, Path],
    max_logprobs: int,
    dtype: str,
) -> list[str]:
    """The words behind ``python`` that start vLLM's server.

    Raises ModelError when an adapter's rank is above ``vllm_max_lora_rank``.
    """
    words: dict[str, Any] = {
        "model": str(model),
        "uds": str(socket),
        "served-model-name": BASE,
        "dtype": dtype,
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": max_logprobs,
        "structured-outputs-config": {"backend": "guidance"},
        "gpu-memory-utilization": section.vllm_gpu_memory_utilization,
        "tensor-parallel-size": section.vllm_tensor_parallel_size,
        "pipeline-parallel-size": section.vllm_pipeline_parallel_size,
        "data-parallel-size": section.vllm_data_parallel_size,
        "enable-expert-parallel": section.vllm_enable_expert_parallel,
        "max-num-seqs": section.vllm_max_num_seqs,
        "max-model-len": section.vllm_max_model_len,
        "disable-custom-all-reduce": section.vllm_disable_custom_all_reduce,
        "disable-cascade-attn": section.vllm_disable_cascade_attn,
        "enforce-eager": section.vllm_enforce_eager,
        "enable-prefix-caching": section.vllm_enable_prefix_caching,
        "quantization": section.vllm_quantization,
        "speculative-config": section.vllm_speculative_config,
        "enable-lora": True,
        "max-lora-rank": lora_rank(section, adapters),
        "max-loras": max(4, len(adapters)),
        "disable-uvicorn-access-log": True,
    }
    words |= {key.replace("_", "-"): value for key, value in section.vllm_engine_kwargs.items()}
    flags = []
    for key, value in words.items():
        if value is True:
            flags.append(f"--{key}")
        elif value is False and key == "enable-prefix-caching":
            flags.append("--no-enable-prefix-caching")
        elif value is not None and value is not False:
            flags += [f"--{key}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    if adapters:
        flags += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return ["-m", "vllm.entrypoints.openai.api_server", *flags]


def lora_rank(section: VllmSection, adapters: Mapping[str, Path]) -> int:
    """The highest rank the server is told. Raises ModelError for an adapter above the user's own limit."""
    limit = section.vllm_max_lora_rank
    ranks = {name: adapter_rank(folder) for name, folder in adapters.items()}
    for name, rank in ranks.items():
        if limit is not None and rank > limit:
            raise ModelError(
                f"the adapter {name} has rank {rank}",
                where="vllm_max_lora_rank",
                fix=f"--vllm_max_lora_rank {rank}",
            )
    needed = limit or max([16, *ranks.values()])
    return next((rank for rank in LORA_RANKS if rank >= needed), LORA_RANKS[-1])


def adapter_rank(folder: Path) -> int:
    """The rank of an adapter in PEFT's format. Raises ModelError when the folder has none."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return max([int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("this is no LoRA adapter", where=str(path), why=repr(error)) from None


def server_variables(section: VllmSection, toolchain: Toolchain) -> dict[str, str]:
    """Environment variables for the server."""
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder
    }
    if toolchain.variant == "cpu":
        free = psutil.virtual_memory().available / (1 << 30)
        cache = section.vllm_cpu_cache_gib or min(MAX_CPU_CACHE_GIB, free / 4)
        variables["VLLM_CPU_KVCACHE_SPACE"] = f"{math.ceil(cache)}"
    return variables
