"""The parallel layout: sizes left open are settled, other tools' words become sizes, the rest is refused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved, Source
from swift.core.errors import ConfigError
from swift.core.registry import suggest

__all__ = ["PRESETS", "check_parallel", "processes_of_launcher", "settle_parallel"]


PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")

_DATA_SIZES = ("data_parallel_size", "data_parallel_shard_size", "data_parallel_replicate_size")

_FROM_ENVIRONMENT = ("nnodes", "node_rank", "master_addr", "master_port")

_SHARDED_OPTIMIZERS = ("adamw", "sgd", "adafactor", "rmsprop", "adagrad", "adamax")


def settle_parallel(resolved: Resolved, *, recorded: bool) -> None:
    """Fill the sizes that nobody gave. Raises ConfigError when they cannot be filled.

    What a run has recorded without anybody having typed it is settled anew: it may go on with other processes.
    ``recorded``: no process is started; the environment may be that of a run which goes on in another layout.
    """
    section = resolved.config.parallel
    if not recorded:
        _take_environment(resolved)
    processes, said_by = _processes(resolved, recorded=recorded)
    zero = _zero(resolved)
    _ring_over_all(resolved, processes, said_by)
    total, shard, copies = (
        resolved.value(name) if resolved.is_explicit(name) else None for name in _DATA_SIZES
    )
    # Experts take their ranks out of those that share a copy of the model.
    inside = section.tensor_parallel_size * section.context_parallel_size
    spread = -(-section.expert_parallel_size // inside)
    if total is None:
        others = section.tensor_parallel_size * section.pipeline_parallel_size * section.context_parallel_size
        if processes is not None and processes % others:
            raise ConfigError(
                f"{processes} processes cannot be laid out",
                where=said_by,
                why=f"tensor {section.tensor_parallel_size} x pipeline {section.pipeline_parallel_size} x context "
                f"{section.context_parallel_size} take {others} at a time",
                fix=f"{max(1, round(processes / others)) * others} processes, or other sizes",
            )
        total = processes // others if processes is not None else (shard or spread) * (copies or 1)
        _set(resolved, "data_parallel_size", total, f"{said_by}: what is left" if processes else "its parts")
    if shard is None:
        wanted = copies is not None or section.fsdp is not None or zero.stage > 0 or spread > 1
        shard = max(1, total // (copies or 1)) if wanted else 1
        _set(resolved, "data_parallel_shard_size", shard, "expert_parallel_size" if spread > 1 else zero.why)
    if copies is None:
        _set(resolved, "data_parallel_replicate_size", max(1, total // shard), "data_parallel_size")
    if not resolved.is_explicit("reshard_after_forward"):
        gathered = section.fsdp == "grads" or zero.stage in (1, 2)
        _set(resolved, "reshard_after_forward", not gathered, "fsdp or deepspeed")
    if not resolved.is_explicit("offload"):
        _set(resolved, "offload", zero.offload, "deepspeed")
    if not resolved.is_explicit("nproc_per_node"):
        per_node = section.num_processes // section.nnodes
        _set(resolved, "nproc_per_node", per_node if per_node > 1 else None, said_by or "the layout")


def check_parallel(resolved: Resolved) -> None:
    """Raises ConfigError for layouts that a run cannot have; a plan gets warnings."""
    section = resolved.config.parallel

    if section.sequence_parallel and section.tensor_parallel_size == 1:
        resolved.refuse("sequence_parallel", "has no effect without tensor parallelism", fix="leave it out")
    _check_sizes(resolved)
    _check_engine(resolved)
    if section.num_processes > 1:
        _check_training(resolved)
    elif section.offload:
        resolved.refuse(
            "offload" if resolved.is_explicit("offload") else "deepspeed",
            "one process has nothing to shard and keeps its weights on the device",
            fix="leave it out, or start more processes with --nproc_per_node",
        )


def _check_sizes(resolved: Resolved) -> None:
    section = resolved.config.parallel
    total, shard = section.data_parallel_size, section.data_parallel_shard_size
    copies = section.data_parallel_replicate_size
    if shard * copies != total:
        name = "data_parallel_shard_size"
        if not resolved.is_explicit(name):
            name = "data_parallel_replicate_size"
        raise resolved.error(
            name,
            f"{copies} copies of {shard} shards are not {total} data-parallel processes",
            fix=f"--data_parallel_size {shard * copies}, or leave one of the sizes out",
        )
    ranks = shard * section.context_parallel_size * section.tensor_parallel_size
    if ranks % section.expert_parallel_size:
        raise resolved.error(
            "expert_parallel_size",
            f"{ranks} processes that share a copy of the model cannot be split in groups of "
            f"{section.expert_parallel_size} for its experts",
            fix=f"--data_parallel_shard_size {section.expert_parallel_size}, or a divisor of {ranks}",
        )
    _check_world_size()
    asked, said_by = _processes(resolved)
    if asked is not None and asked != section.num_processes:
        raise ConfigError(
            f"{asked} processes, but the sizes multiply to {section.num_processes}",
            where=said_by,
            fix=f"{section.num_processes} processes, or leave out --data_parallel_size: it takes what is left",
        )
    if section.num_processes % section.nnodes:
        raise resolved.error(
            "nnodes",
            f"{section.num_processes} processes cannot be split evenly over {section.nnodes} machines",
            fix="--nproc_per_node N: how many processes each machine has",
        )
    if section.nnodes > 1 and section.master_addr is None:
        raise resolved.error(
            "nnodes",
            f"{section.nnodes} machines have to know where they meet",
            fix="--master_addr HOST (the same on all of them)",
        )


def _check_engine(resolved: Resolved) -> None:
    section = resolved.config.parallel
    mixes = _mixes(resolved)
    if section.parallel_method == "megatron" and not mixes:
        resolved.refuse(
            "parallel_method",
            "Megatron-Core needs CUDA and its own packages, and comes with a later version",
            fix="leave it out: the native engine takes the same sizes",
        )
    if mixes:
        resolved.warnings.append(
            f"{mixes}: no engine combines these; the native engine does what is meant: tensor "
            f"{section.tensor_parallel_size} x pipeline {section.pipeline_parallel_size} x FSDP "
            f"{section.data_parallel_shard_size}, {section.num_processes} processes"
        )
    elif section.deepspeed and section.num_processes > 1:
        how = "FSDP2" if section.data_parallel_shard_size > 1 else "plain data parallelism"
        resolved.warnings.append(
            f"{resolved.place('deepspeed')}: the native engine does it: {how} over "
            f"{section.data_parallel_size} processes"
        )


def _mixes(resolved: Resolved) -> str:
    """The words of the articles that are never one engine: Megatron's dimensions with ZeRO or FSDP."""
    section = resolved.config.parallel
    sharding = [
        name
        for name in ("deepspeed", "fsdp", "data_parallel_shard_size")
        if resolved.is_explicit(name) and resolved.value(name) not in (None, 1)
    ]
    if section.parallel_method != "megatron" or not sharding:
        return ""
    return f"--parallel_method megatron with --{sharding[0]} {resolved.value(sharding[0])}"


def _check_training(resolved: Resolved) -> None:
    """What several processes cannot do yet."""
    config, tuner = resolved.config, resolved.config.tuner
    divided = _divided(resolved)
    sharded = config.parallel.data_parallel_shard_size > 1 or bool(divided)
    if divided:
        _check_divided(resolved, divided)
    whole = {f"rlhf_type {config.rlhf.rlhf_type} samples": config.rlhf.is_policy}
    whole["eval_tasks are answered"] = config.evaluation.eval_tasks is not None
    for what in (what for what, wanted in whole.items() if wanted and "pipeline_parallel_size" in divided):
        resolved.refuse(
            "pipeline_parallel_size",
            f"{what} with whole models, and no process has all layers",
            why="weights of other processes are gathered for that time where layers, experts or weights are shared, "
            "not where whole layers lie elsewhere",
            fix="--tensor_parallel_size or --data_parallel_shard_size",
        )
    if config.rlhf.precompute_ref_log_probs:
        resolved.refuse("precompute_ref_log_probs", "one process does that", fix="leave it out")
    if config.report.debug_mode:
        resolved.refuse("debug_mode", "the inspection is for one process", fix="leave it out")
    if tuner.init_weights not in ("default", "gaussian") and (sharded or tuner.init_weights == "lora-ga"):
        resolved.refuse(
            "init_weights",
            f"starts that read the weights ({tuner.init_weights}) are for one process",
            fix="--init_weights default",
        )
    if config.training.torch_compile:
        resolved.refuse("torch_compile", "torch.compile is for one process", fix="leave it out")
    if sharded:
        _check_sharded(resolved, divided)
    elif config.parallel.offload:
        resolved.refuse(
            "offload",
            "offloading is for sharded weights",
            fix=f"--data_parallel_shard_size {config.parallel.data_parallel_size}",
        )


def _check_sharded(resolved: Resolved, divided: list[str]) -> None:
    """What a model of which each process has a part cannot do. ``divided``: by which sizes beside its shards."""
    config, tuner = resolved.config, resolved.config.tuner
    if config.model.torch_dtype == "float16":
        resolved.refuse(
            "torch_dtype",
            "float16 is for whole models",
            why="gradients overflow on one shard, and the others would not know",
            fix="--torch_dtype bfloat16",
        )
    own = tuner.tuner_type in ("lora", "full") and not tuner.use_dora
    if not own:
        resolved.refuse(
            "tuner_type",
            "DoRA cannot be sharded" if tuner.use_dora else f"{tuner.tuner_type} cannot be sharded",
            fix="--tuner_type lora or full, or --data_parallel_shard_size 1 (every process has the whole model)",
        )
    if config.optimizer.optim not in _SHARDED_OPTIMIZERS:
        resolved.refuse(
            "optim",
            f"{config.optimizer.optim} works on whole matrices, or on states that cannot be sharded",
            fix="--optim adamw, or --data_parallel_shard_size 1",
        )
    quantised = config.quantization
    if quantised.is_active and (quantised.quant_method, quantised.quant_bits) != ("bnb", 4):
        resolved.refuse(
            "quant_bits",
            "of quantised bases only those of 4 bits by bitsandbytes can be sharded",
            fix="--quant_method bnb --quant_bits 4, or --data_parallel_shard_size 1: every process has the base whole",
        )
    if quantised.is_active and {*divided} - {"context_parallel_size"}:
        resolved.refuse(
            divided[0],
            "the layers of a quantised base are not divided",
            fix="--data_parallel_shard_size N, which shards its bytes",
        )
    if config.quantization.needs_torchao or tuner.lisa_activated_layers or tuner.longlora_group_size:
        place = f"{config.parallel.num_processes} processes"
        resolved.refuse(place, "quantisation-aware, float8, LISA and LongLoRA training cannot be sharded")
    if config.training.neftune_noise_alpha:
        resolved.refuse("neftune_noise_alpha", "noisy embeddings cannot be sharded", fix="leave it out")


_DIVIDING = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "expert_parallel_size",
)


def _divided(resolved: Resolved) -> list[str]:
    """The sizes by which one copy of the model, or one sequence, is divided."""
    return [name for name in _DIVIDING if resolved.value(name) > 1]


def _check_divided(resolved: Resolved, divided: list[str]) -> None:
    """What has no parity test in a divided model. ``divided``: by which sizes it is."""
    config, section = resolved.config, resolved.config.parallel
    place = resolved.place(divided[0])
    if config.task.task_type != "causal_lm" and config.rlhf.rlhf_type != "rm":
        resolved.refuse(
            place,
            f"{config.task.task_type} is for whole models",
            fix="--data_parallel_shard_size, or language modelling and reward models",
        )
    if config.rlhf.rlhf_type == "rm" and section.pipeline_parallel_size > 1:
        resolved.refuse(
            "pipeline_parallel_size",
            "the score head of a reward model is not kept by a stage",
            fix="--tensor_parallel_size, --context_parallel_size or --data_parallel_shard_size",
        )
    if config.model.torch_dtype == "float16":
        resolved.refuse("torch_dtype", "float16 is for whole models", fix="--torch_dtype bfloat16")
    if config.training.use_liger_kernel and section.expert_parallel_size > 1:
        resolved.warnings.append(
            f"{resolved.place('use_liger_kernel')}: experts on several devices compute without liger's kernel; norms, "
            "rotary embedding and MLPs use theirs"
        )
    if config.tuner.modules_to_save:
        resolved.refuse("modules_to_save", "saved modules cannot be divided", fix="leave it out")
    if config.training.activation_cpu_offload:
        resolved.refuse("activation_cpu_offload", "is for whole models", fix="leave it out")
    others = (
        section.data_parallel_shard_size > 1 or len(divided) > 1 or config.training.gradient_checkpointing
    )
    if (
        section.pipeline_parallel_size > 1
        and section.pipeline_schedule in ("zbv", "interleaved_zb")
        and others
    ):
        resolved.refuse(
            "pipeline_schedule",
            f"{section.pipeline_schedule} cuts backward passes in two, which is tested for stages alone",
            why="not with shards, other dimensions, or gradient checkpointing",
            fix="--pipeline_schedule interleaved_1f1b",
        )
    accumulated = config.training.gradient_accumulation_steps or 1
    if section.microbatches is not None and section.microbatches != accumulated:
        resolved.refuse(
            "microbatches",
            f"a step has {accumulated} micro-batches for each process",
            why="the stages of a pipeline work on those of gradient accumulation",
            fix=f"--gradient_accumulation_steps {section.microbatches}",
        )


def processes_of_launcher() -> int | None:
    """How many processes torchrun (or our own launcher) has started; None: this is not one of several."""
    return _number("WORLD_SIZE") if "RANK" in os.environ else None


def _check_world_size() -> None:
    wanted = _number("WORLD_SIZE")
    if wanted is not None and wanted > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"the environment speaks of {wanted} processes, but not which of them this one is",
            where=f"WORLD_SIZE={wanted}",
            fix="unset WORLD_SIZE and use --nproc_per_node, or set RANK and LOCAL_RANK too (torchrun does)",
        )


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _asked(name: str) -> int | None:
    """What a variable asks for. Raises ConfigError unless it is a number."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{text!r} is no number", where=f"{name} of the environment", fix=f"unset {name}")
    return int(text) if text else None


def _take_environment(resolved: Resolved) -> None:
    """ms-swift's variables, where no option is given."""
    for name in _FROM_ENVIRONMENT:
        text = os.environ.get(name.upper(), "")
        if text and not resolved.is_explicit(name) and processes_of_launcher() is None:
            value = text if name == "master_addr" else _asked(name.upper())
            resolved.put(name, value, Source("derived", f"derived from {name.upper()} of the environment"))


def _processes(resolved: Resolved, *, recorded: bool = False) -> tuple[int | None, str]:
    """How many processes there will be when somebody has said so, and who; ``recorded``: there were."""
    section = resolved.config.parallel
    started = None if recorded else processes_of_launcher()
    if started is not None:
        return started, f"WORLD_SIZE={started}"
    nodes = section.nnodes
    typed, said = section.nproc_per_node, None if recorded else _asked("NPROC_PER_NODE")
    if typed is not None and resolved.sources["nproc_per_node"].kind in ("flag", "python"):
        return typed * nodes, resolved.place("nproc_per_node")
    if said is not None:
        return said * nodes, f"NPROC_PER_NODE={said}"
    if typed is not None and resolved.is_explicit("nproc_per_node"):
        return typed * nodes, resolved.place("nproc_per_node")
    return None, ""


def _ring_over_all(resolved: Resolved, processes: int | None, said_by: str) -> None:
    """A method without a size (``--use_ring_attention True``) is for all processes that have nothing else to do."""
    section = resolved.config.parallel
    if section.sequence_parallel_method == "auto" or resolved.is_explicit("context_parallel_size"):
        return
    taken = section.tensor_parallel_size * section.pipeline_parallel_size
    total, shard, copies = (resolved.value(name) if resolved.is_explicit(name) else 1 for name in _DATA_SIZES)
    taken *= max(total, shard * copies)
    size = max(1, (processes or taken) // taken)
    _set(resolved, "context_parallel_size", size, said_by or "one process")
    if size == 1:
        resolved.warnings.append(
            f"--sequence_parallel_method {section.sequence_parallel_method}: one process holds the whole sequence; "
            "--sequence_parallel_size N shares it among N"
        )


def _set(resolved: Resolved, name: str, value: Any, because: str) -> None:
    if value == resolved.value(name) and resolved.sources[name].kind == "default":
        return
    resolved.put(name, value, Source("derived", f"derived from {because}"))


@dataclass(frozen=True)
class _Zero:
    """What DeepSpeed's words mean: the stage of sharding, and whether states are kept in host memory."""

    stage: int = 0
    offload: bool = False
    why: str = "data_parallel_size"


def _zero(resolved: Resolved) -> _Zero:
    word = resolved.config.parallel.deepspeed
    if word is None:
        return _Zero(why="fsdp" if resolved.config.parallel.fsdp else "data_parallel_size")
    place = resolved.place("deepspeed")
    if word in PRESETS:
        return _Zero(int(word[4]), word.endswith("offload"), f"deepspeed {word}")
    if not word.endswith(".json"):
        raise ConfigError(
            f"{word!r} is no stage of ZeRO",
            where=place,
            fix=suggest(word, PRESETS, f"{', '.join(PRESETS)}, or a DeepSpeed JSON file"),
        )
    file = Path(word).expanduser()
    if not file.is_file():
        if not resolved.planning:
            raise ConfigError(
                "there is no such file", where=f"{place} {word}", fix="zero3, or the path of a file"
            )
        resolved.warnings.append(f"{place} {word}: there is no such file here; it is planned as zero3")
        return _Zero(3, False, "deepspeed")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        zero = settings.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError("cannot be read", where=str(file), why=str(error)) from None
    return _Zero(stage, _take_file(resolved, settings, zero, f"{place} {word}"), f"deepspeed {word}")


_FILE_OPTIONS = {
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "train_batch_size": "global_batch_size",
}
"""What a DeepSpeed file says about training -> our option, when that is not given."""

_TUNING = frozenset(
    "stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size "
    "contiguous_gradients round_robin_gradients sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_gather_16bit_weights_on_model_save offload_optimizer offload_param".split()
)
"""Keys of zero_optimization that are read, or tune what FSDP2 does by itself."""


def _take_file(resolved: Resolved, settings: dict[str, Any], zero: dict[str, Any], place: str) -> bool:
    """Take over what a DeepSpeed file says, name what is left; returns whether states are offloaded."""
    known = {"zero_optimization", "fp16", "bf16", *_FILE_OPTIONS, "steps_per_print", "wall_clock_breakdown"}
    for key, name in _FILE_OPTIONS.items():
        value = settings.get(key, "auto")
        if value != "auto" and resolved.sources[name].kind in ("default", "derived"):
            resolved.put(name, value, Source("file", f"{place}: {key}"))
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = settings.get(key, {}).get("enabled", "auto")
        if enabled is True and not resolved.is_explicit("torch_dtype"):
            if dtype == "float16" and zero.get("stage", 0):
                dtype = "bfloat16"
                resolved.warnings.append(
                    f"{place}: fp16: shards compute in bfloat16, whose range needs no scaling of the loss"
                )
            resolved.put("torch_dtype", dtype, Source("file", f"{place}: {key}"))
    devices = {zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    if "nvme" in devices:
        raise ConfigError(
            "states cannot be kept on an NVMe disk",
            where=place,
            fix='"device": "cpu", or leave the offloading out',
        )
    left = sorted({*settings} - known) + [f"zero_optimization.{key}" for key in sorted({*zero} - _TUNING)]
    if left:
        resolved.warnings.append(f"{place}: not used by the native engine: {', '.join(left)}")
    return "cpu" in devices
