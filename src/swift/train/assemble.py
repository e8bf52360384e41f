"""From a model to an engine: tuner, checkpointing, optimizers, objective.

A run does this with weights (`swift.train.build`), an exact memory estimate without (`swift.train.memory`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.core.format import format_bytes
from swift.core.logging import get_logger
from swift.data.channels import Channels
from swift.models.classifier import SCORE
from swift.models.head import split_head, split_like_small
from swift.models.quantised import stored_weights
from swift.models.streamed import fill, has_no_weights
from swift.objectives.base import Objective
from swift.objectives.sft import SftObjective
from swift.parallel.engine import ParameterSet
from swift.parallel.native import NativeEngine
from swift.parallel.world import World
from swift.train.low_precision import train_in_float8, train_quantisation_aware
from swift.train.optimizers import build_optimizer
from swift.train.precision import param_dtype
from swift.train.preflight import check_tuner_options
from swift.train.schedules import learning_rate_schedule
from swift.train.tasks import engine_of, pooled_objective, tuner_of
from swift.tuners.adapter import OtherAdapter
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel, apply_tuner
from swift.tuners.longlora import use_shifted_groups
from swift.tuners.peft_format import adapter_folder, load_adapter
from swift.tuners.starts import start_from_rounding
from swift.tuners.switch import AdapterSwitch
from swift.tuners.targets import decoder_layers, output_head_name

logger = get_logger(__name__)

__all__ = ["make_engine", "make_objective", "tune_model"]


def tune_model(
    model: Any,
    resolved: Resolved,
    *,
    device: torch.device,
    dtype: torch.dtype,
    total_steps: int,
    base: Path | None,
    restored: bool = False,
    name: str = DEFAULT_ADAPTER,
) -> TunedModel:
    """Attach the tuner, store frozen weights in the computing precision, switch on checkpointing.

    Args:
        dtype: the computing precision.
        base: folder of the model, for starts that read its weights.
        restored: the values come from a checkpoint (or do not matter), so no start is computed.
        name: under which LoRA is attached.
    """
    config = resolved.config
    if config.model.adapters:
        if len(config.model.adapters) > 1 or config.tuner.tuner_type != "lora":
            raise ConfigError(
                "training goes on from one adapter, whose folder says of what kind it is",
                where="--adapters",
                fix="name one adapter, and leave out --tuner_type",
            )
        folder = adapter_folder(config.model.adapters[0])
        check_tuner_options(resolved, folder)
        tuned = load_adapter(model, folder, name, trainable=True)
        names = [name for group in tuned.parameter_sets().values() for name in group]
        if config.task.has_score_head and not any(SCORE in name.split(".") for name in names):
            raise ConfigError(
                "this adapter brings no score head",
                where=f"--adapters {config.model.adapters[0]}",
                why="it was trained for another task; its run would learn with a random head that is not kept",
                fix="leave it out, or merge it first (swift merge-lora) and train on the merged model",
            )
    else:
        tuned = apply_tuner(
            model,
            tuner_of(resolved),
            seed=config.training.seed,
            param_dtype=param_dtype(resolved),
            adapter_name=name,
            total_steps=total_steps,
            restored=restored,
        )
        if config.tuner.init_weights == "loftq" and not restored:
            assert base is not None
            start_from_rounding(model, name, stored_weights(base))
        for parameter in model.parameters():
            if not parameter.requires_grad and tuned.kind == "full":
                parameter.data = parameter.data.to(dtype)
    if config.tuner.longlora_group_size:
        use_shifted_groups(model, config.tuner.longlora_group_size)
    if config.quantization.qat_bits is not None:
        train_quantisation_aware(model, config.quantization, output_head_name(model))
    if config.quantization.fp8:
        train_in_float8(model, device, output_head_name(model))
    if config.training.gradient_checkpointing:
        _recompute(model, config.training.recompute_num_layers, tuned.switch)
    return tuned


def _recompute(model: Any, num_layers: int | None, switch: AdapterSwitch | None) -> None:
    """Gradient checkpointing of the first ``num_layers`` decoder layers (None: of all).

    ``switch``: of the adapters, whose dropout is drawn as the first time, whatever is being computed meanwhile.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if switch is not None:
        options["context_fn"] = lambda: (contextlib.nullcontext(), switch.drawing(switch.draws))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if num_layers is None:
        return
    layers: Any = decoder_layers(model)[1]
    for layer in layers[num_layers:]:
        if not hasattr(layer, "gradient_checkpointing"):
            why = f"{type(layer).__name__} cannot be told apart from the others"
            raise ConfigError("all layers or none", where="--recompute_num_layers", why=why)
        layer.gradient_checkpointing = False


def make_engine(
    tuned: TunedModel,
    resolved: Resolved,
    *,
    device: torch.device,
    dtype: torch.dtype,
    total_steps: int,
    tokenizer: Any,
    world: World | None = None,
    weights: Path | None = None,
    shared: dict[str, Any] | None = None,
    **options: Any,
) -> NativeEngine:
    """The engine of the task, with an optimizer for each parameter set; ``options`` go to the engine.

    With several processes the model is divided here: all its parts have to be there, and have their values. A model
    without weights gets them from the folder ``weights`` when it is divided. ``shared``: how a model that other runs
    use too is divided; the first one divides it, and adapters stay whole.
    """
    training = resolved.config.training
    make = engine_of(resolved.config, tuned.model, tokenizer)
    divided: dict[str, Any] = {}
    if world is not None and world.size == 1:
        world = None  # nothing is divided
    if world is not None:
        split = options.get("split") or getattr(make, "keywords", {}).get("split", split_head)
        used_whole = resolved.config.rlhf.is_policy or resolved.config.evaluation.eval_tasks is not None
        if used_whole and world.layout.dp_shard * world.layout.tp > 1:
            options["gathered"] = _gathered(tuned, resolved, device, dtype)
        divide = partial(_divided_once, tuned, resolved, device, dtype, world, weights, split)
        parts, divided = divide(frozenset()) if shared is None else _divided_for_all(tuned, shared, divide)
        options["split"] = lambda _: parts
    sets = _parameter_sets(tuned, resolved, device, total_steps)
    if world is not None:
        from swift.parallel.data_parallel import Ranks

        trained = {name: parameter for group in sets for name, parameter in group.parameters.items()}
        options["ranks"] = Ranks(world, trained, keeps_whole=shared is not None, **divided)
    return make(
        tuned.model,
        sets,
        device=device,
        dtype=dtype,
        chunk_size=training.logits_chunk_size,
        compile_model=training.torch_compile,
        penalty=tuned.other.penalty if tuned.other else None,
        offload_activations=training.activation_cpu_offload,
        **options,
    )


def _parameter_sets(
    tuned: TunedModel, resolved: Resolved, device: torch.device, total_steps: int
) -> list[ParameterSet]:
    """What is trained, each part with its optimizer and its learning rates."""
    training = resolved.config.training
    assert training.learning_rate is not None
    warmup = training.warmup_steps
    schedule = learning_rate_schedule(
        training.lr_scheduler_type,
        peak=training.learning_rate,
        total_steps=total_steps,
        warmup_steps=math.ceil(total_steps * training.warmup_ratio) if warmup is None else warmup,
        min_ratio=training.min_lr_ratio,
        decay_ratio=training.lr_decay_ratio,
    )
    head = output_head_name(tuned.model)
    sets = [
        ParameterSet(
            name,
            parameters,
            build_optimizer(parameters, training, resolved.config.optimizer, device, head=head),
            schedule,
            training.max_grad_norm,
        )
        for name, parameters in tuned.parameter_sets().items()
    ]
    if tuned.other is not None:
        sets[0].optimizer.register_step_post_hook(_after_step(tuned.other))
    return sets


Divide = Callable[[frozenset[torch.nn.Parameter]], tuple[Any, dict[str, Any]]]
"""Parameters that stay whole -> `_divided_once`."""


def _divided_for_all(tuned: TunedModel, shared: dict[str, Any], divide: Divide) -> tuple[Any, dict[str, Any]]:
    """The same of a model that several runs use: the first of them divides it, and leaves in ``shared`` how."""
    if shared:
        return _with_own_head(tuned.model, shared["parts"], shared["head"]), shared["divided"]
    parts, divided = divide(frozenset(tuned.named_trainable().values()))
    named = tuned.model.named_modules()
    head = next((name for name, module in named if parts and module is parts[1]), None)
    shared.update(parts=parts, divided=divided, head=head)
    return parts, divided


def _with_own_head(model: Any, parts: Any, head: str | None) -> Any:
    """Backbone and head of a divided model, whose head may have got an adapter meanwhile."""
    return parts if parts is None or head is None else (parts[0], model.get_submodule(head))


def _divided_once(
    tuned: TunedModel,
    resolved: Resolved,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    weights: Path | None,
    split: Callable[[Any], Any],
    whole: frozenset[torch.nn.Parameter],
) -> tuple[Any, dict[str, Any]]:
    """Backbone and head of this rank's part of the model, which has its weights then, and what `Ranks` is told."""
    autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    streams, layout = weights is not None and has_no_weights(tuned.model), world.layout
    parts = None
    if not streams or layout.tp * layout.pp > 1:
        with autocast:  # tries the model, which in parts works as a whole only
            parts = split_like_small(tuned.model) if streams else split(tuned.model)
    parts, divided = _divide(tuned, resolved, dtype, world, parts, whole)
    if not streams:
        return parts, divided
    assert weights is not None
    count = fill(tuned.model, weights, torch.device("cpu") if resolved.config.parallel.offload else device)
    logger.info("rank %d has read %s of the weights", world.rank, format_bytes(count))
    if layout.tp * layout.pp == 1:
        with torch.no_grad(), autocast:
            (parts,) = divided["root"](lambda: (split(tuned.model),))
            divided["root"].free()
    return parts, divided


def _divide(
    tuned: TunedModel,
    resolved: Resolved,
    dtype: torch.dtype,
    world: World,
    split: Any,
    whole: frozenset[torch.nn.Parameter],
) -> tuple[Any, dict[str, Any]]:
    """Backbone and head of this rank's part of the model, and what `Ranks` is told of it."""
    from swift.parallel.data_parallel import ShardOptions
    from swift.parallel.distribute import distribute

    section = resolved.config.parallel
    options = ShardOptions(
        param_dtype=_gathered_dtype(tuned, resolved, dtype),
        reshard_after_forward=section.reshard_after_forward,
        offload=section.offload,
        whole=whole,
    )
    shards = options if world.layout.dp_shard > 1 else None
    found = distribute(tuned.model, world, split, section, shards)
    return found.split, found.parts


def _gathered_dtype(tuned: TunedModel, resolved: Resolved, dtype: torch.dtype) -> torch.dtype | None:
    """With full training sharded weights are gathered in the computing precision; None: as they are stored."""
    return dtype if tuned.kind == "full" and dtype != param_dtype(resolved) else None


def _gathered(tuned: TunedModel, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> Any:
    """What answers are sampled with, and tasks are measured."""
    from swift.models.quantised_shards import unwrap_quantised
    from swift.parallel.gathered import GatheredModel

    unwrap_quantised(tuned.model)  # as it is divided
    return GatheredModel(tuned.model, device, _gathered_dtype(tuned, resolved, dtype))


def _after_step(adapter: OtherAdapter) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        adapter.after_step()

    return hook


def make_objective(resolved: Resolved, channels: Channels | None = None, *, validation: bool) -> Objective:
    """Dynamic weights are for learning only: what is measured stays the cross-entropy."""
    config = resolved.config
    pooled = pooled_objective(config)
    if pooled is not None:
        return pooled
    dynamic = config.training.enable_dft_loss and not validation
    if channels is None:
        return SftObjective(dynamic=dynamic)
    return SftObjective(dynamic=dynamic, groups=channels.of_targets, num_groups=len(channels.names))
