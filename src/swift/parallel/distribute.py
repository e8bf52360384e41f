"""A model on one process becomes this rank's part of a layout: experts, then layers, then stages, then shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from swift.config.sections.parallel import ParallelSection
from swift.core.errors import ConfigError
from swift.models.attention import VARLEN
from swift.models.quantised_shards import unwrap_quantised
from swift.parallel.accepted import Decoder, check_dimensions, split_degree
from swift.parallel.data_parallel import ShardedRoot, ShardOptions, shard_model
from swift.parallel.experts import ExpertParallel, apply_expert_parallel
from swift.parallel.pipeline import Pipeline
from swift.parallel.sequence.context import ContextParallel
from swift.parallel.tensor import TensorParallel, apply_tensor_parallel, split_output_matrix
from swift.parallel.world import World
from swift.tuners.targets import decoder_layers

__all__ = ["Distributed", "distribute"]

Split = tuple[nn.Module, nn.Module] | None


@dataclass
class Distributed:
    """What `Ranks` needs to know of a divided model, and its backbone and head (None: they cannot be told apart)."""

    split: Split = None
    parts: dict[str, Any] = field(default_factory=dict)


def distribute(
    model: Any, world: World, split: Split, section: ParallelSection, shards: ShardOptions | None
) -> Distributed:
    """Divide a model (in place), adapters included, as the section says.

    Args:
        split: backbone and head of the whole model.
        shards: how weights are sharded; None: they are not.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    assert world.mesh is not None
    layout, mesh = world.layout, world.mesh
    decoder = Decoder.of(model.config.to_dict())
    check_dimensions(section, decoder)
    _check_loaded(model, section, split)
    if shards is not None:
        unwrap_quantised(model)
    experts: ExpertParallel | None = None
    tensor: TensorParallel | None = None
    context: ContextParallel | None = None
    pipeline: Pipeline | None = None
    root: ShardedRoot | None = None
    if layout.ep > 1:
        experts = apply_expert_parallel(model, layout, mesh.device_type)
    if layout.tp > 1:
        tensor = apply_tensor_parallel(model, mesh["tp"], sequence=section.sequence_parallel)
        if split is not None:
            split_output_matrix(model, split[1], mesh["tp"], tensor, layout.dp_shard * layout.cp)
    if layout.cp > 1:
        heads, shared = decoder.heads // layout.tp, max(1, decoder.key_value_heads // layout.tp)
        ring, _ = split_degree(section.sequence_parallel_method, layout.cp, heads, shared)
        context = ContextParallel(mesh["cp"].get_group(), ring)
    if layout.pp > 1:
        share = layout.tp if section.sequence_parallel else 1
        pipeline = Pipeline(model, mesh["pp"].get_group(), section.pipeline_schedule, width_share=share)
        assert split is not None
        split = split if pipeline.has_last else (split[0], nn.Identity())
    if shards is not None:
        stages = list(pipeline.stages.values()) if pipeline else []
        root = shard_model(model, decoder_layers(model)[1], world, shards, stages, experts)
    parts = {"root": root, "context": context, "tensor": tensor, "pipeline": pipeline, "experts": experts}
    return Distributed(split, parts)


def _check_loaded(model: Any, section: ParallelSection, split: Split) -> None:
    """What only the loaded model can tell."""
    if model.config._attn_implementation != VARLEN and (
        section.context_parallel_size > 1 or section.sequence_parallel
    ):
        raise ConfigError(
            f"attention {model.config._attn_implementation} does not know of tokens on other devices",
            where="--context_parallel_size" if section.context_parallel_size > 1 else "--sequence_parallel",
            why=f"{VARLEN} does, which is the default where it computes what the model's own attention does",
            fix="leave --attn_impl out, or the sizes",
        )
    if section.pipeline_parallel_size > 1 and split is None:
        raise ConfigError(
            f"the head of {type(model).__name__} cannot be told apart from its backbone",
            where="--pipeline_parallel_size",
            fix="--data_parallel_shard_size",
        )
