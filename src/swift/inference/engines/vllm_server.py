"""How vLLM's server is started: its words, its variables, what it must know of adapters beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from swift.config.sections.engine import EngineSection
from swift.config.sections.vllm import VllmSection
from swift.core.errors import ConfigError, ModelError
from swift.models.facts import read_model_config

__all__ = ["BASE", "Launch", "check_adapter", "check_weights", "server_arguments", "server_variables"]

BASE = "base"
"""What the base model is called inside the server."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32, ``v1/attention/backends/cpu_attn.py``."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told as the highest rank."""
MAX_CPU_CACHE_GIB = 8.0


@dataclass(frozen=True)
class Launch:
    """How a server is to be started.

    Attributes:
        model: folder of the model.
        options: the options that all engines have.
        section: the options ``vllm_*``.
        adapters: name inside the server -> folder, loaded at the start.
        dtype: precision of the computation, as vLLM names it.
        trust_remote_code: run code from the model's folder.
        max_logprobs: most alternatives a request may ask for.
        variables: environment variables, over ours.
    """

    model: Path
    options: EngineSection = field(default_factory=EngineSection)
    section: VllmSection = field(default_factory=VllmSection)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_logprobs: int = 20
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_adapters(self) -> bool:
        """Whether the server can have adapters."""
        return bool(self.adapters) if self.section.vllm_enable_lora is None else self.section.vllm_enable_lora

    @property
    def max_lora_rank(self) -> int:
        """The highest rank of an adapter that the server is told."""
        ranks = [check_adapter(folder) for folder in self.adapters.values()]
        needed = self.section.vllm_max_lora_rank or max([16, *ranks])
        return next((rank for rank in LORA_RANKS if rank >= needed), LORA_RANKS[-1])

    def check(self) -> None:
        """Raise ConfigError or ModelError for adapters that the server will not take."""
        if self.adapters and not self.takes_adapters:
            raise ConfigError("adapters are given", where="--vllm_enable_lora false", fix="leave it out")
        for folder in self.adapters.values():
            check_adapter(folder, self.max_lora_rank)


def check_weights(model: Path, features: Sequence[str]) -> None:
    """Raise ModelError for what vLLM has no kernel for on a CPU: its server starts, and dies with the first request.

    Weights of 4 bits and fewer need AVX-512; attention knows the `CPU_HEAD_SIZES` only.
    """
    whole = read_model_config(model)
    heads = whole.get("num_attention_heads")
    size = whole.get("head_dim") or (whole["hidden_size"] // heads if heads else None)
    if size is not None and size not in CPU_HEAD_SIZES:
        raise ModelError(
            f"vLLM cannot compute attention heads of {size} on a CPU",
            where=str(model),
            why=f"it knows sizes of {', '.join(map(str, CPU_HEAD_SIZES))}",
            fix="--infer_backend transformers",
        )
    config = whole.get("quantization_config") or {}
    groups = (config.get("config_groups") or {}).values()
    bits = [config.get("bits"), *((group.get("weights") or {}).get("num_bits") for group in groups)]
    is_x86 = any(name.startswith("avx") for name in features)
    if is_x86 and "avx512f" not in features and any(found is not None and found <= 4 for found in bits):
        raise ModelError(
            "vLLM cannot compute with 4-bit weights on this CPU",
            where=str(model),
            why="its kernels for them need AVX-512",
            fix="--infer_backend transformers, 8-bit weights, or a machine with AVX-512",
        )


def check_adapter(folder: Path, limit: int | None = None) -> int:
    """The rank of an adapter in PEFT's format.

    Raises ModelError when the folder has none, or one that vLLM cannot put on: above the rank ``limit``, or with more
    than LoRA's two matrices a layer.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *(int(value) for value in (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("this is no LoRA adapter", where=str(path), why=repr(error)) from None
    more = [key for key in ("use_dora", "modules_to_save", "target_parameters") if config.get(key)]
    if more:
        raise ModelError(
            "vLLM cannot put this adapter on",
            where=str(path),
            why=f"{more[0]} is set",
            fix="swift merge-lora first",
        )
    if limit is not None and rank > limit:
        raise ModelError(
            f"the adapter has rank {rank}, vLLM is started for at most {limit}",
            where=str(folder),
            fix=f"start with --vllm_max_lora_rank {rank}",
        )
    return rank


def server_arguments(launch: Launch, socket: Path) -> list[str]:
    """The words behind ``python`` that start vLLM's server on a Unix socket."""
    section = launch.section
    words: dict[str, Any] = {
        "uds": str(socket),
        "served-model-name": BASE,
        "dtype": launch.dtype,
        "trust-remote-code": launch.trust_remote_code,
        # Every choice is in the request: the model's own defaults must not add to it.
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": launch.max_logprobs,
        "structured-outputs-config": {"backend": "guidance"},
        "gpu-memory-utilization": launch.options.memory_utilization,
        "max-num-seqs": launch.options.max_num_seqs,
        "max-model-len": launch.options.max_model_len,
        "tensor-parallel-size": section.vllm_tensor_parallel_size,
        "pipeline-parallel-size": section.vllm_pipeline_parallel_size,
        "data-parallel-size": section.vllm_data_parallel_size,
        "enable-expert-parallel": section.vllm_enable_expert_parallel,
        "disable-custom-all-reduce": section.vllm_disable_custom_all_reduce,
        "disable-cascade-attn": section.vllm_disable_cascade_attn,
        "enforce-eager": section.vllm_enforce_eager,
        "enable-prefix-caching": section.vllm_enable_prefix_caching,
        "quantization": section.vllm_quantization,
        "speculative-config": section.vllm_speculative_config,
        "disable-uvicorn-access-log": True,
    }
    if launch.takes_adapters:
        words |= {
            "enable-lora": True,
            "max-lora-rank": launch.max_lora_rank,
            "max-loras": max(4, len(launch.adapters)),
        }
    words |= {key.replace("_", "-"): value for key, value in section.vllm_engine_kwargs.items()}
    flags = []
    for key, value in words.items():
        if value is True:
            flags.append(f"--{key}")
        elif value is False and (
            key == "enable-prefix-caching" or key.replace("-", "_") in section.vllm_engine_kwargs
        ):
            flags.append(f"--no-{key}")
        elif value is not None and value is not False:
            flags += [f"--{key}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    if launch.adapters:
        flags += ["--lora-modules", *(f"{name}={folder}" for name, folder in launch.adapters.items())]
    return ["-m", "vllm.entrypoints.cli.main", "serve", str(launch.model), *flags]


def server_variables(launch: Launch, variant: str) -> dict[str, str]:
    """Environment variables for the server, for a toolchain of this variant."""
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder
    }
    if variant == "cpu":
        free = psutil.virtual_memory().available / (1 << 30)
        cache = launch.section.vllm_cpu_cache_gib or min(MAX_CPU_CACHE_GIB, free / 4)
        variables["VLLM_CPU_KVCACHE_SPACE"] = f"{math.ceil(cache)}"
        # Its own choice of cores would be that of every other job too.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables | dict(launch.variables)
