"""Which runs can share one base model, as far as their options tell."""

from __future__ import annotations

import json
from typing import Any

from swift.config.schema import Config

__all__ = ["fusing_problem", "model_options"]

_OF_THE_MODEL = {
    "model": ("torch_dtype", "attn_impl", "trust_remote_code", "device", "model_revision"),
    "quantization": (
        "quant_method",
        "quant_bits",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
    ),
    "training": ("gradient_checkpointing", "recompute_num_layers", "use_liger_kernel"),
    "parallel": ("data_parallel_size", "data_parallel_shard_size", "reshard_after_forward"),
}
"""Options that change the model itself, so that runs on one model have them in common."""


def model_options(config: Config) -> dict[str, Any]:
    """Flag -> value of everything that runs on one model have in common, beside the model's folder."""
    found = {
        f"--{name}": getattr(getattr(config, section), name)
        for section, names in _OF_THE_MODEL.items()
        for name in names
    }
    return json.loads(json.dumps(found, default=str))


def _division_problems(config: Config) -> dict[str, tuple[Any, str]]:
    """Copies and shards of the base are shared, by runs that have no parts of their own in it."""
    parallel = config.parallel
    sizes = (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "context_parallel_size",
        "expert_parallel_size",
    )
    sharded = parallel.data_parallel_shard_size > 1
    return {
        **{
            f"--{name}": (getattr(parallel, name) > 1, "the base is shared whole or in shards")
            for name in sizes
        },
        "--offload": (parallel.offload, "adapters stay on the device"),
        "--modules_to_save": (sharded and config.tuner.modules_to_save, "copies of shards are nobody's"),
        "--eval_tasks": (
            sharded and config.evaluation.eval_tasks is not None,
            "tasks are answered with a whole model, which is made before the base is in shards",
        ),
        "--nnodes": (parallel.nnodes > 1, "the group is one command on one machine"),
    }


def fusing_problem(config: Config) -> tuple[str, str] | None:
    """(option, why) that keeps a run from sharing its base model; None when it can."""
    tuner, training, quantization = config.tuner, config.training, config.quantization
    belongs = "the head of the model belongs to the task"
    refused = {
        "--tuner_type": (
            tuner.tuner_type != "lora" or tuner.use_dora or tuner.target_parameters,
            "only LoRA adapters share a base model",
        ),
        **_division_problems(config),
        "--neftune_noise_alpha": (training.neftune_noise_alpha, "its noise would reach the rows of others"),
        "--torch_compile": (training.torch_compile, "runs come and go, which would compile again and again"),
        "--activation_cpu_offload": (training.activation_cpu_offload, "it is not built for several runs"),
        "--longlora_group_size": (tuner.longlora_group_size, "it changes the attention of the model"),
        "--qat_bits": (quantization.qat_bits is not None, "it changes the layers of the model"),
        "--fp8": (quantization.fp8, "it changes the layers of the model"),
        "--task_type": (config.task.task_type != "causal_lm", belongs),
        "--rlhf_type": (
            config.rlhf.rlhf_type == "rm" or config.rlhf.is_policy,
            "answers are sampled between the steps" if config.rlhf.is_policy else belongs,
        ),
        "--report_to": (
            set(config.report.report_to) - {"none", "tensorboard"},
            "these trackers know one run for each process",
        ),
    }
    return next(((option, why) for option, (is_set, why) in refused.items() if is_set), None)
