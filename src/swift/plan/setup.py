"""What decides the memory of a run, from its options and its model; and the memory and disk parts of a plan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.config.sections.rlhf import RlhfSection
from swift.core.errors import SwiftError
from swift.core.files import free_bytes
from swift.models.facts import ModelFacts
from swift.models.quantised import stored_method
from swift.plan.adapters import adapter_memory
from swift.plan.analytic import (
    DTYPE_BYTES,
    AdapterMemory,
    Setup,
    checkpoint_bytes,
    memory_parts,
    whole_bytes,
    with_overhead,
)
from swift.plan.device import DeviceFacts
from swift.plan.modules import (
    LinearShape,
    adapted_layers,
    layer_parameters,
    linear_layers,
    parameter_sizes,
    saved_parameters,
    trainable_parameters,
)
from swift.plan.quantised import frozen_bytes, largest_unpacked
from swift.plan.sampling import make_sampling, merged_numbers
from swift.train.optimizers import OPTIMIZERS, is_target, state_bytes
from swift.tuners.registry import METHODS

__all__ = ["ExactMethod", "Widest", "compute_dtype", "make_setup", "memory_of", "parts_of"]


@dataclass(frozen=True)
class Widest:
    """The largest micro-batch: rows of so many tokens each, which hold so many sequences.

    ``longest``: tokens of the longest sequence. ``targets``: tokens whose probabilities are read, at most.
    ``prompts``: how many prompts the answers among the sequences share; 0: each has its own.
    """

    rows: int
    width: int
    sequences: int
    longest: int
    targets: int
    prompts: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.width


ExactMethod = Callable[[Resolved, ModelFacts, Path | None, Widest, Setup], dict[str, int]]
"""Another way to bytes by part, from the same things (`swift.train.memory`, which needs torch)."""


def compute_dtype(resolved: Resolved, device: DeviceFacts) -> str:
    """The precision that ``torch_dtype`` means on a device."""
    name = resolved.config.model.torch_dtype
    if name != "auto":
        return name
    return "bfloat16" if device.kind in ("cuda", "npu", "xpu") else "float32"


def make_setup(
    resolved: Resolved,
    facts: ModelFacts,
    folder: Path | None,
    device: DeviceFacts,
    widest: Widest,
    warnings: list[str],
) -> Setup:
    """What decides memory."""
    config = resolved.config
    tuner, parallel, compute = config.tuner, config.parallel, compute_dtype(resolved, device)
    trained = _trained(resolved, facts, folder, warnings)
    adapted, layers, size = trained.adapted, trained.layers, DTYPE_BYTES[compute]
    is_lora, shapes = not tuner.trains_whole_model, trained.shapes
    setup = Setup(
        compute=compute,
        is_lora=is_lora,
        trainable=trained.numbers,
        trainable_bytes=trained.storage,
        saved_modules=trained.saved,
        adapters=adapter_memory(facts, shapes, adapted, tuner, size, device.kind != "cpu"),
        updated=trained.updated if tuner.lisa_activated_layers else None,
        trains_head=_trains_head(facts, resolved),
        tokens=widest.tokens,
        targets=widest.targets,
        copied=widest.sequences * widest.longest / widest.tokens if widest.prompts else 0.0,
        documents=widest.sequences // widest.rows,
        accumulates=(config.training.gradient_accumulation_steps or 1) > 1,
        checkpointing=bool(config.training.gradient_checkpointing),
        recomputed=config.training.recompute_num_layers,
        offloaded=config.training.activation_cpu_offload,
        chunk=_chunk(resolved, widest),
        device=device.kind,
        model_shares=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        sequence_shares=parallel.tensor_parallel_size * parallel.context_parallel_size,
        # FSDP shards over the ranks of a sequence too.
        shards=parallel.data_parallel_shard_size * parallel.context_parallel_size
        if parallel.data_parallel_shard_size > 1
        else 1,
        keeps_gathered=not parallel.reshard_after_forward,
        states_in_host=parallel.offload and device.kind != "cpu",
        weights_bytes=frozen_bytes(facts, layers, config.quantization, size) if is_lora else None,
        unpacked=largest_unpacked(layers, config.quantization),
        optimizer_bytes=state_bytes(config.optimizer, trained.updated, trained.storage, trained.matrices),
        update_numbers=OPTIMIZERS[config.optimizer.optim].update_numbers,
        eager_width=widest.width if config.model.attn_impl == "eager" else 0,
        judged_passes=_judged_passes(config.rlhf),
        merged=merged_numbers(
            resolved, [(one.inputs, one.outputs) for one in adapted], compute, trained.saved
        ),
    )
    is_8bit = config.quantization.is_active and config.quantization.quant_bits == 8
    if is_8bit and _adapts_linear(resolved):
        # bitsandbytes' 8-bit product keeps its input, where LoRA with dropout keeps a copy of its own.
        setup = replace(setup, adapters=replace(setup.adapters, reads=AdapterMemory().reads))
    whole = whole_bytes(facts, setup) if setup.shards > 1 else 0.0
    casts = facts.num_parameters * setup.compute_bytes if setup.has_cast_copies else 0.0
    return replace(setup, sampling=make_sampling(resolved, widest.longest, gathered=whole, casts=casts))


@dataclass(frozen=True)
class _Trained:
    """What a run trains.

    Attributes:
        shapes: of the model's parameters, by name.
        layers, adapted: the linear layers, and those that get an adapter.
        saved: numbers trained in full beside adapters.
        numbers: trained in all; ``storage``: bytes of one of them.
        updated: those that an optimizer keeps states of at a time (fewer with LISA).
        matrices: (rows, columns) of what low-rank optimizers project.
    """

    shapes: dict[str, tuple[int, ...]]
    layers: list[LinearShape]
    adapted: list[LinearShape]
    saved: int
    numbers: int
    storage: int
    updated: int
    matrices: list[tuple[int, int]]


def _adapts_linear(resolved: Resolved) -> bool:
    tuner = resolved.config.tuner
    return not tuner.trains_whole_model and tuner.tuner_type in METHODS


def _trained(resolved: Resolved, facts: ModelFacts, folder: Path | None, warnings: list[str]) -> _Trained:
    config, tuner = resolved.config, resolved.config.tuner
    shapes = parameter_sizes(folder)
    layers = linear_layers(facts, {} if stored_method(facts.config) else shapes)
    adapted = adapted_layers(layers, tuner) if _adapts_linear(resolved) else []
    if _adapts_linear(resolved) and not adapted and not tuner.target_parameters:
        warnings.append("no linear layer of this model matches target_modules: nothing would be adapted")
    saved = 0 if tuner.trains_whole_model else saved_parameters(facts, shapes, tuner)
    if config.task.has_score_head:
        saved += facts.hidden_size * (config.task.num_labels or 1)
    numbers = updated = trainable_parameters(facts, shapes, adapted, tuner) + saved
    if tuner.lisa_activated_layers:
        resting = max(0, facts.num_layers - tuner.lisa_activated_layers)
        updated -= resting * layer_parameters(facts, shapes)
    if tuner.trains_whole_model:
        stored = "bfloat16" if config.model.param_dtype == "bfloat16" else "float32"
        targets = config.optimizer.galore_target_modules
        matrices = [
            (one.outputs, one.inputs) for one in layers if is_target(f"{one.name}.weight", 2, targets, None)
        ]
    else:
        stored = tuner.lora_dtype
        matrices = [(one.inputs, tuner.lora_rank) for one in adapted]
        matrices += [(one.outputs, tuner.lora_rank) for one in adapted]
    return _Trained(shapes, layers, adapted, saved, numbers, DTYPE_BYTES[stored], updated, matrices)


def _judged_passes(rlhf: RlhfSection) -> int:
    reference = int(rlhf.runs_reference)
    return reference + (1 + reference if rlhf.rlhf_type == "kto" else 0)


def _trains_head(facts: ModelFacts, resolved: Resolved) -> bool:
    tuner = resolved.config.tuner
    named = {"lm_head"} | ({"embed_tokens"} if facts.tie_word_embeddings else set())
    if not tuner.trains_whole_model:
        return bool(named & {name.rpartition(".")[2] for name in tuner.modules_to_save})
    return tuner.tuner_type == "full" and not any(name in named for name in tuner.freeze_parameters)


def _chunk(resolved: Resolved, widest: Widest) -> int:
    """Positions whose logits exist at once; a generative reranker makes those of each sequence's end, others none."""
    kind = resolved.config.task.task_type
    if kind == "causal_lm":
        return resolved.config.training.logits_chunk_size
    return widest.sequences if kind == "generative_reranker" else 0


def parts_of(
    resolved: Resolved,
    facts: ModelFacts,
    setup: Setup,
    device: DeviceFacts,
    exact: dict[str, int] | None = None,
) -> dict[str, int]:
    """Bytes by part, with the reference of preference learning and what process and allocator need."""
    facts = _grown(resolved, facts, setup.trainable)
    parts = with_overhead(memory_parts(facts, setup) if exact is None else exact, device.kind)
    reference = _reference_bytes(resolved, facts, setup)
    return {**parts, "reference": reference} if reference else parts


def _reference_bytes(resolved: Resolved, facts: ModelFacts, setup: Setup) -> int:
    """What the reference of preference learning keeps beside the model (see `swift.train.reference`).

    Nothing where LoRA is switched off for it; a copy of the trained weights; or a model of its own, which is of the
    same size unless it is found on this disk.
    """
    config, rlhf = resolved.config, resolved.config.rlhf
    if not rlhf.runs_reference:
        return 0
    if rlhf.ref_model is not None or (rlhf.ref_adapters and rlhf.ref_adapters != config.model.adapters):
        with contextlib.suppress(SwiftError):  # the run will say what is wrong with it
            if rlhf.ref_model is not None and Path(rlhf.ref_model).expanduser().is_dir():
                facts = ModelFacts.read(Path(rlhf.ref_model).expanduser())
        layers, size = linear_layers(facts, {}), DTYPE_BYTES[setup.compute]
        return frozen_bytes(facts, layers, config.quantization, size) or facts.num_parameters * size
    if setup.is_lora and config.tuner.init_weights != "loftq" and not config.model.adapters:
        return 0
    return setup.trainable * setup.trainable_bytes


def _grown(resolved: Resolved, facts: ModelFacts, trainable: int) -> ModelFacts:
    """The model as it will be: LLaMA-Pro adds layers."""
    if resolved.config.tuner.tuner_type != "llamapro":
        return facts
    layers = facts.num_layers + resolved.config.tuner.llamapro_num_new_blocks
    parts = {**facts.parts, "mlp": facts.parts["mlp"] + trainable}
    return replace(facts, num_layers=layers, parts=parts)


def memory_of(
    resolved: Resolved,
    facts: ModelFacts,
    setup: Setup,
    device: DeviceFacts,
    steps: dict[str, Any],
    exact: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The memory part of a plan, and the disk part in it; ``exact``: bytes by part that were found otherwise."""
    parts = parts_of(resolved, facts, setup, device, exact)
    facts = _grown(resolved, facts, setup.trainable)
    options = resolved.config.checkpoint
    one = checkpoint_bytes(
        facts,
        setup,
        only_model=options.save_only_model,
        export_bytes=DTYPE_BYTES.get(facts.dtype) if facts.dtype else None,
    )
    number = _num_checkpoints(resolved, steps)
    return {
        "parts": parts,
        "total": sum(parts.values()),
        "method": "formula" if exact is None else "traced",
        "device": device.kind,
        "device_bytes": device.memory_bytes,
        "disk": {
            "checkpoint_bytes": one,
            "checkpoints": number,
            # While one is written, the ones before it are still there.
            "total_bytes": one * number,
            "free_bytes": free_bytes(Path(options.output_dir).expanduser().absolute()),
        },
    }


def _num_checkpoints(resolved: Resolved, steps: dict[str, Any]) -> int:
    """Checkpoints on disk at most: those saved, or save_total_limit besides best and last, and one being written."""
    options = resolved.config.checkpoint
    if not steps:
        return 1
    if options.save_strategy == "no":
        saved = 1
    elif options.save_strategy == "epoch":
        saved = math.ceil(steps["total"] / steps["steps_per_epoch"])
    else:
        saved = math.ceil(steps["total"] / options.save_steps)
    if options.save_total_limit is None:
        return saved
    return min(saved, options.save_total_limit + 3)
