"""How vLLM serves a model (``--infer_backend vllm``). The names are ms-swift's, the meanings vLLM's."""

from __future__ import annotations

from typing import Any

from swift.config.option import Section, option


class VllmSection(Section):
    """vLLM, in its toolchain. Also for it: max_num_seqs, max_model_len, memory_utilization, max_waiting."""

    vllm_tensor_parallel_size: int = option(1, "Devices that split each layer.", ge=1)
    vllm_pipeline_parallel_size: int = option(1, "Groups of devices that take the layers in turn.", ge=1)
    vllm_data_parallel_size: int = option(1, "Copies of the model that share the requests.", ge=1)
    vllm_enable_expert_parallel: bool = option(False, "Give each device whole experts, not parts of all.")
    vllm_disable_custom_all_reduce: bool = option(False, "Leave reductions between devices to NCCL.")
    vllm_disable_cascade_attn: bool = option(False, "Do not compute a prefix common to a batch once for all.")
    vllm_enforce_eager: bool = option(
        False, "Compile nothing and record no CUDA graphs: starts sooner, runs slower."
    )
    vllm_enable_prefix_caching: bool | None = option(
        None, "Keep the cache of prompts' beginnings for later requests; default: vLLM decides."
    )
    vllm_enable_lora: bool | None = option(
        None, "Be ready for adapters, also later ones; default: when adapters are given."
    )
    vllm_max_lora_rank: int | None = option(
        None, "Highest rank of an adapter; default: that of the adapters given, at least 16.", ge=1
    )
    vllm_quantization: str | None = option(
        None,
        "Format of the weights (awq, gptq, fp8, compressed-tensors...); default: as the model's files say.",
    )
    vllm_speculative_config: dict[str, Any] | None = option(
        None, "How to guess several tokens ahead, as vLLM's --speculative-config has it."
    )
    vllm_cpu_cache_gib: float | None = option(
        None,
        "On a CPU: memory for the cache; default: a quarter of what is free, at most 8.",
        unit="GiB",
        gt=0,
    )
    vllm_start_seconds: float = option(
        1200.0, "Longest time until vLLM answers after its start.", unit="seconds", gt=0
    )
    vllm_engine_kwargs: dict[str, Any] = option(
        {},
        'Further options of vllm serve: {"max_num_batched_tokens": 4096} is --max-num-batched-tokens 4096.',
    )
