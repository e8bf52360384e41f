"""Which parameters a run trains, by name and shape, read from the headers of the weights (or from config.json)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swift.config.sections.tuner import TunerSection
from swift.models.counting import has_gate
from swift.models.facts import ModelFacts, stored_tensors
from swift.plan.analytic import LinearShape
from swift.tuners.registry import METHODS, count_decoder_layer, count_layer

__all__ = [
    "adapted_layers",
    "frozen_names",
    "layer_parameters",
    "linear_layers",
    "parameter_sizes",
    "saved_parameters",
    "trainable_parameters",
]

_OTHER = re.compile(
    r"(^|\.)(embed_\w+|wte|wpe|lm_head|embed_out|router)$|norm|(^|\.)ln_|\.experts(\.|$)|\.gate$"
)


def parameter_sizes(folder: Path | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all stored tensors; empty when there are no safetensors files, or no folder."""
    if folder is None:
        return {}
    return {name: tuple(entry["shape"]) for name, entry in stored_tensors(folder).items()}


def linear_layers(facts: ModelFacts, shapes: dict[str, tuple[int, ...]]) -> list[LinearShape]:
    """All linear layers but the output head and fused experts, from the stored shapes or, without them, as Llama's."""
    if shapes:
        return [
            LinearShape(name.removesuffix(".weight"), shape[-1], shape[0])
            for name, shape in shapes.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and not _OTHER.search(name.removesuffix(".weight"))
        ]
    hidden, inner = facts.hidden_size, facts.intermediate_size
    queries = facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    layer = [
        ("self_attn.q_proj", hidden, queries),
        ("self_attn.k_proj", hidden, keys),
        ("self_attn.v_proj", hidden, keys),
        ("self_attn.o_proj", queries, hidden),
    ]
    if not facts.is_mixture_of_experts:
        gate = [("mlp.gate_proj", hidden, inner)] if has_gate(facts.model_type) else []
        layer += [*gate, ("mlp.up_proj", hidden, inner), ("mlp.down_proj", inner, hidden)]
    return [
        LinearShape(f"model.layers.{number}.{name}", inputs, outputs)
        for number in range(facts.num_layers)
        for name, inputs, outputs in layer
    ]


def adapted_layers(layers: Sequence[LinearShape], tuner: TunerSection) -> list[LinearShape]:
    """The layers that get an adapter, by the rules of the tuner options; may be empty."""
    saved = tuple(tuner.modules_to_save)
    layers = [layer for layer in layers if not any(_ends_with(layer.name, name) for name in saved)]
    if tuner.target_regex is not None:
        return [layer for layer in layers if re.fullmatch(tuner.target_regex, layer.name)]
    return [
        layer
        for layer in layers
        if any(target == "all-linear" or _ends_with(layer.name, target) for target in tuner.target_modules)
    ]


def saved_parameters(facts: ModelFacts, shapes: dict[str, tuple[int, ...]], tuner: TunerSection) -> int:
    """Parameters of the modules that are trained in full beside the adapters."""
    count = 0
    for name in tuner.modules_to_save:
        mine = [
            math.prod(shape) for full, shape in shapes.items() if _ends_with(full.rpartition(".")[0], name)
        ]
        if not mine and name in ("lm_head", "embed_tokens"):  # tied (stored once), or no weights here
            mine = [facts.vocab_size * facts.hidden_size]
        count += sum(mine)
    return count


def trainable_parameters(
    facts: ModelFacts,
    shapes: dict[str, tuple[int, ...]],
    adapted: Sequence[LinearShape],
    tuner: TunerSection,
) -> int:
    """Parameters that the tuner trains, those of ``modules_to_save`` left out."""
    if tuner.tuner_type == "full":
        return full_trainable(facts, shapes, tuner)
    if tuner.tuner_type == "llamapro":
        return tuner.llamapro_num_new_blocks * layer_parameters(facts, shapes)
    if tuner.tuner_type in METHODS:
        count = sum(count_layer(layer.name, layer.inputs, layer.outputs, tuner) for layer in adapted)
        return count + _expert_parameters(facts, tuner)
    number = len(set(tuner.reft_layers)) if tuner.tuner_type == "reft" else 0
    return (number or facts.num_layers) * count_decoder_layer(facts.hidden_size, tuner)


def layer_parameters(facts: ModelFacts, shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters of one decoder layer: the last."""
    last = f".{facts.num_layers - 1}."
    stored = sum(math.prod(shape) for name, shape in shapes.items() if last in name)
    inside = facts.num_parameters - facts.parts["embedding"] - facts.parts["head"] - facts.hidden_size
    return stored or inside // facts.num_layers


def _expert_parameters(facts: ModelFacts, tuner: TunerSection) -> int:
    """LoRA on fused experts ``[experts, outputs, inputs]``: A and B of the rank for each of them.

    Files hold the experts one by one or fused, under names of their own, so the sizes come from config.json.
    """
    hidden, inner = facts.hidden_size, facts.config.get("moe_intermediate_size") or facts.intermediate_size
    layers = facts.num_layers - (facts.config.get("first_k_dense_replace") or 0)
    sizes = {"gate_up_proj": hidden + 2 * inner, "down_proj": inner + hidden}
    wanted = sum(sizes.get(target.rpartition(".")[2], 0) for target in tuner.target_parameters)
    return tuner.lora_rank * facts.num_experts * layers * wanted


def full_trainable(facts: ModelFacts, shapes: dict[str, tuple[int, ...]], tuner: TunerSection) -> int:
    """Parameters that full training trains: all but what the freeze options name."""
    if not shapes:
        return round(facts.num_parameters * (1 - tuner.freeze_parameters_ratio))
    return facts.num_parameters - sum(math.prod(shapes[name]) for name in frozen_names(facts, shapes, tuner))


def frozen_names(facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]], tuner: TunerSection) -> set[str]:
    """The stored parameters that the freeze options name."""
    frozen: set[str] = set()
    limit, count = int(facts.num_parameters * tuner.freeze_parameters_ratio), 0
    for name, shape in shapes.items():
        count += math.prod(shape)
        if count <= limit:
            frozen.add(name)
    frozen |= _named(shapes, tuner.freeze_parameters, tuner.freeze_parameters_regex)
    frozen -= _named(shapes, tuner.trainable_parameters, tuner.trainable_parameters_regex)
    return frozen


def _named(names: Iterable[str], starts: Sequence[str], pattern: str | None) -> set[str]:
    found = {name for name in names if starts and name.startswith(tuple(starts))}
    return found | {name for name in names if pattern is not None and re.search(pattern, name)}


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
