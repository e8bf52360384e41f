"""A small configuration of any architecture transformers knows, made from its own by rules on the names of its sizes.

Widths, depths, numbers of heads and experts go by name; a list with one entry per layer keeps one layer of every
kind; nested configurations (text, vision, audio) are shrunk the same way. What does not follow from names stands in
`EXCEPTIONS`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swift.core.errors import UsageError
from swift.core.registry import closest

__all__ = ["TinySizes", "find_architecture", "shrink_config", "shrunk_copy"]


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny model. Heads have 16 channels; half as many key/value heads where there are fewer of them."""

    hidden: int = 64
    layers: int = 2
    vocab: int = 512
    positions: int = 2048
    experts: int = 4

    @property
    def heads(self) -> int:
        return max(2, self.hidden // 16)


# Small value <- the keys of configurations that get it, as patterns. The first that matches wins; only integers change.
_RULES: tuple[tuple[Callable[[TinySizes], int], str], ...] = (
    (
        lambda s: s.layers,
        "(num_)?((hidden|encoder|decoder)_)?layers num_(text|vision|language)_layers n_layers? depth num_blocks",
    ),
    (lambda s: s.vocab, "vocab_size vocab_size_per_layer_input (encoder|decoder)_vocab_size n_vocab"),
    (
        lambda s: s.experts,
        "((num|n)_)?((hidden|local|routed)_)?experts ((ffn|moe)_)?num_experts num_moe_experts",
    ),
    (
        lambda s: 2,
        "(num_)?experts_per_tok(en)? moe_(router_)?top_?k moe_k top_k_experts num_selected_experts"
        " linear_num_key_heads index_n_heads",
    ),
    (
        lambda s: 1,
        "n_group topk_groups? num_expert_groups? first_k_dense_replace num_dense_layers moe_layer_start_index",
    ),
    (lambda s: s.heads, ".*(num_|n_)?(attention_)?heads?"),
    (
        lambda s: 16,
        "((linear_(key|value)|attention|global|swa|index|mamba|kda|rope|attn|v|qk)_)?head_dim kv_channels d_kv"
        " d_head head_size .*lora_rank index_topk (mamba_)?(d_state|ssm_state_size|state_size)"
        " (mamba_)?chunk_size hidden_size_per_layer_input",
    ),
    (lambda s: 8, "qk_(rope|nope)_head_dim rotary_dim"),
    (
        lambda s: 2 * s.hidden,
        ".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size)(_mlp)? d_ff dff dim_ff n_inner"
        " d_inner inner_dim",
    ),
    (
        lambda s: s.hidden,
        "((out|text|lm)_)?hidden_(size|dim) n_embd ((d|n)_)?(model|embed)(_dim)? dim embed(ding)?_(size|dim)"
        " word_embed_proj_dim emb_dim lru_width projection_dim",
    ),
    (
        lambda s: s.positions,
        "max_position_embeddings n_positions n_ctx (max_)?(seq|sequence)_len(gth)? max_(target|source)_positions"
        " context_length",
    ),
    (lambda s: 32, "image_size"),
)
_COMPILED = tuple((re.compile("|".join(f"({p})" for p in text.split())), small) for small, text in _RULES)
_KV = re.compile(r".*(num_key_value_heads|num_kv_heads|n_kv_heads?|n_head_kv)")

# What names do not tell: architecture -> values that go over those of the rules ("text_config" reaches inside).
EXCEPTIONS: dict[str, Mapping[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "dbrx": {"tie_word_embeddings": False},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "doge": {"num_experts": 16, "num_experts_per_tok": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16},
    "xlnet": {"d_head": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16},
}


def find_architecture(name: str) -> tuple[str, str]:
    """(model type, class name) of an architecture given as either: ``qwen3_moe``, ``Qwen3MoeForCausalLM``.

    Raises:
        UsageError: transformers has no such generating model; names the nearest.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    key = name.lower().replace("-", "_")
    kind = next((kind for kind in CONFIG_MAPPING_NAMES if kind.replace("-", "_") == key), None)
    if kind is not None:  # by the names alone, which spares the import of the tables of models
        guess = CONFIG_MAPPING_NAMES[kind].removesuffix("Config") + "ForCausalLM"
        found = getattr(transformers, guess, None)
        if found is not None and found.config_class.__name__ == CONFIG_MAPPING_NAMES[kind]:
            return kind, guess
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    known = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if kind is not None and kind in known:
        return kind, known[kind]
    classes = {class_name: kind for kind, class_name in reversed(known.items())}
    if name in classes:
        return classes[name], name
    near = closest(name, [*known, *classes])
    raise UsageError(
        f"transformers knows no architecture {name!r}",
        why=f"{len(known)} are known, such as llama, qwen3_moe, Qwen2_5_VLForConditionalGeneration",
        fix=f"did you mean {near!r}?" if near else None,
    )


def shrink_config(model_type: str, class_name: str, sizes: TinySizes, **overrides: Any) -> Any:
    """A configuration for a class of transformers with these sizes; ``overrides`` win over everything."""
    import transformers

    config_class = getattr(transformers, class_name).config_class
    default = config_class()
    # A tokenizer without a first token says None, which some classes do not take: then theirs stays.
    overrides = {
        key: value
        for key, value in overrides.items()
        if value is not None or getattr(default, key, 0) is None
    }
    values = _shrunk(default, sizes)
    if "is_decoder" in default.to_dict():
        values["is_decoder"] = True  # encoders that can be told to look back only
    return config_class(**_merge(_merge(values, EXCEPTIONS.get(model_type, {})), overrides))


def shrunk_copy(config: Any, sizes: TinySizes) -> Any:
    """A configuration like this one in everything but its sizes."""
    other = copy.deepcopy(config)
    for key, value in _shrunk(config, sizes).items():
        setattr(other, key, value)
    return other


def _merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, Mapping) and key.endswith("config")
        merged[key] = _merge(inner, value) if both and isinstance(inner, dict) else value
    return merged


def _shrunk(config: Any, sizes: TinySizes) -> dict[str, Any]:
    """Keyword arguments for the class of ``config``: those that a tiny model has otherwise than it."""
    nested = {name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None}
    plain = {key: value for key, value in config.to_dict().items() if key not in nested}
    kept = _kept_layers(plain, sizes.layers)
    values: dict[str, Any] = {"tie_word_embeddings": True} if "tie_word_embeddings" in plain else {}
    for key, value in plain.items():
        if isinstance(value, list) and kept and len(value) == kept[0]:
            if key != "layer_types" or len(set(value)) > 1:  # of one kind: the class derives it from the rest
                values[key] = [value[index] for index in kept[1]]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = len(kept[1]) if kept and _is_depth(key) else _small(key, value, plain, sizes)
            if small is not None and small != value:
                values[key] = small
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            values[key] = _small_rope(value)
    for name in nested:
        inner = getattr(config, name)
        values[name] = {"model_type": inner.model_type, **_shrunk(inner, sizes)}
    return values


def _is_depth(key: str) -> bool:
    return _COMPILED[0][0].fullmatch(key) is not None


def _kept_layers(values: Mapping[str, Any], layers: int) -> tuple[int, list[int]] | None:
    """(layers there are, positions of those that stay): one of every kind, and at least ``layers``."""
    depth = next((value for key, value in values.items() if _is_depth(key) and isinstance(value, int)), 0)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth > 0]
    if not lists:
        return None
    rows = [str(row) for row in zip(*lists, strict=True)]
    first = sorted({row: index for index, row in reversed(list(enumerate(rows)))}.values())
    others = [index for index in range(depth) if index not in first]
    return depth, sorted([*first, *others[: max(0, layers - len(first))]])


def _small(key: str, value: int, values: Mapping[str, Any], sizes: TinySizes) -> int | None:
    if key.endswith(("_token_id", "_token_index")):
        return value if value < sizes.vocab else sizes.vocab - 1 - value % 100
    if key == "head_dim" and values.get("qk_rope_head_dim") == value:
        key = "qk_rope_head_dim"
    if _KV.fullmatch(key):
        return sizes.heads if values.get("kv_lora_rank") else sizes.heads // 2
    for pattern, small in _COMPILED:
        if pattern.fullmatch(key):
            return small(sizes)
    return None


def _small_rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of multimodal positions must add up to half of a head's channels."""
    small = dict(value)
    for key, inner in value.items():
        if key == "mrope_section":
            small[key] = [2, 3, 3]
        elif isinstance(inner, dict):
            small[key] = _small_rope(inner)
    return small
