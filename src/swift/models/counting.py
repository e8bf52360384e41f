"""Parameters of a decoder, counted from its configuration or from the shapes of its weights.

A table of families rather than a model: what they share (grouped-query attention, a gated feed-forward, root
mean square norms) and where they differ (biases, norms of queries and keys, fused projections, experts,
latent attention). Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["count_by_config", "count_tensors", "decoder_sizes", "has_gate", "routed_parameters"]

# Families whose feed-forward layer is two matrices with an activation between them, without a gate.
_UNGATED = ("bloom", "codegen", "falcon", "gpt", "mpt", "nemotron", "opt", "phi", "starcoder2")
_GATED_AFTER_ALL = ("gpt_oss", "phi3", "phi4", "phimoe", "falcon_h1", "falcon_mamba")


def has_gate(model_type: str) -> bool:
    """Whether a feed-forward layer has three matrices (gate, up, down) rather than two."""
    return not model_type.startswith(_UNGATED) or model_type.startswith(_GATED_AFTER_ALL)


def decoder_sizes(config: dict[str, Any]) -> dict[str, int]:
    """The numbers every decoder has, under the names different families give them."""

    def first(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return config[name]
        if default is None:
            raise KeyError(names[0])
        return default

    hidden = first("hidden_size", "n_embd", "d_model", "emb_dim")
    # A model whose layers only carry a state (Mamba, RWKV) has no heads; its layers are measured as one wide head.
    only_states = 1 if {"state_size", "attention_hidden_size"} & set(config) else None
    heads = first(
        "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "decoder_attention_heads",
        "num_decoder_attention_heads", default=only_states,
    )  # fmt: skip
    kinds = config.get("layers_block_type") or config.get("layer_types") or []
    layers = first(
        "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers",
        default=len(kinds) or None,
    )  # fmt: skip
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": first("num_key_value_heads", default=heads),
        "head_dim": first("head_dim", default=hidden // heads),
        "intermediate_size": first(
            "intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", default=4 * hidden
        ),
        "vocab_size": first("vocab_size"),
        "max_position_embeddings": first("max_position_embeddings", "n_positions", "n_ctx", default=2048),
        "num_experts": first("num_experts", "num_local_experts", "n_routed_experts", default=0),
        "num_experts_per_token": first("num_experts_per_tok", "moe_top_k", default=0),
    }


def count_by_config(config: dict[str, Any], sizes: dict[str, int], tied: bool) -> dict[str, int]:
    """Parameters by part, computed."""
    kind = config.get("model_type", "")
    layers, hidden, vocab = sizes["num_layers"], sizes["hidden_size"], sizes["vocab_size"]
    embedding = vocab * hidden
    if kind == "gpt2":
        inner = sizes["intermediate_size"]
        return {
            "embedding": embedding + sizes["max_position_embeddings"] * hidden,
            "attention": layers * (4 * hidden * hidden + 4 * hidden),
            "mlp": layers * (2 * hidden * inner + inner + hidden),
            "norm": (2 * layers + 1) * 2 * hidden,
            "head": 0 if tied else embedding,
            "other": 0,
        }
    norms_per_layer = 4 if kind.startswith(("gemma2", "gemma3")) else 1 if kind == "cohere" else 2
    norm = (norms_per_layer * layers + 1) * hidden
    if kind.startswith(("qwen3", "gemma3")):
        norm += 2 * layers * sizes["head_dim"]
    mlp, router = _mlp_by_config(config, sizes)
    return {
        "embedding": embedding,
        "attention": layers * _attention_by_config(config, sizes),
        "mlp": mlp,
        "norm": norm + _latent_norms(config, layers),
        "head": 0 if tied else embedding,
        "other": router,
    }


def _attention_by_config(config: dict[str, Any], sizes: dict[str, int]) -> int:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if config.get("kv_lora_rank"):  # Multi-head latent attention, arXiv 2405.04434 section 2.1.
        key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        rank, latent = config.get("q_lora_rank"), config["kv_lora_rank"]
        query = hidden * rank + rank * heads * key if rank else hidden * heads * key
        down = hidden * (latent + config["qk_rope_head_dim"])
        up = latent * heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        return query + down + up + heads * config["v_head_dim"] * hidden
    queries, keys = heads * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    bias = 0
    if config.get("model_type") in ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text"):
        bias = queries + 2 * keys
    elif config.get("attention_bias"):
        # GLM leaves the bias of the output projection out.
        bias = queries + 2 * keys + (0 if config.get("model_type", "").startswith("glm") else hidden)
    return hidden * (queries + 2 * keys) + queries * hidden + bias


def _latent_norms(config: dict[str, Any], layers: int) -> int:
    if not config.get("kv_lora_rank"):
        return 0
    return layers * (config["kv_lora_rank"] + (config.get("q_lora_rank") or 0))


def _mlp_by_config(config: dict[str, Any], sizes: dict[str, int]) -> tuple[int, int]:
    """(parameters of all feed-forward layers, of all routers)."""
    layers, hidden, inner = sizes["num_layers"], sizes["hidden_size"], sizes["intermediate_size"]
    experts = sizes["num_experts"]
    if not experts:
        bias = 2 * inner + hidden if config.get("mlp_bias") else 0
        matrices = 3 if has_gate(config.get("model_type", "")) else 2
        return layers * (matrices * hidden * inner + bias), 0
    sparse = _num_sparse_layers(config, layers)
    shared = 3 * hidden * _shared_size(config)
    mlp = sparse * shared + (layers - sparse) * 3 * hidden * inner + routed_parameters(config, sizes)
    return mlp, sparse * experts * hidden


def _num_sparse_layers(config: dict[str, Any], layers: int) -> int:
    dense = config.get("first_k_dense_replace", 0) + len(config.get("mlp_only_layers") or [])
    step = config.get("decoder_sparse_step", 1) or 1
    return max(0, layers - dense) // step


def _shared_size(config: dict[str, Any]) -> int:
    if config.get("shared_expert_intermediate_size"):
        return config["shared_expert_intermediate_size"]
    return (config.get("n_shared_experts") or 0) * config.get("moe_intermediate_size", 0)


def routed_parameters(config: dict[str, Any], sizes: dict[str, int]) -> int:
    inner = config.get("moe_intermediate_size") or sizes["intermediate_size"]
    sparse = _num_sparse_layers(config, sizes["num_layers"])
    return sparse * sizes["num_experts"] * 3 * sizes["hidden_size"] * inner


def count_tensors(tensors: dict[str, tuple[int, ...]], tied: bool) -> dict[str, int]:
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "head", "other"), 0)
    for name, shape in tensors.items():
        if name.endswith("correction_bias"):
            continue  # A buffer of DeepSeek's router, no parameter.
        part = _part_of(name)
        if part == "head" and tied:
            continue
        parts[part] += math.prod(shape)
    return parts


def _part_of(name: str) -> str:
    pieces = name.lower().split(".")
    if any("norm" in piece or piece.startswith("ln_") for piece in pieces):
        return "norm"
    if "lm_head" in pieces or "embed_out" in pieces:
        return "head"
    if any(piece in ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in") for piece in pieces):
        return "embedding"
    if any(piece in ("gate", "router") for piece in pieces):
        return "other"
    if any("attn" in piece or "attention" in piece for piece in pieces):
        return "attention"
    if any(
        "mlp" in piece or "expert" in piece or "moe" in piece or piece.startswith("feed_forward")
        for piece in pieces
    ):
        return "mlp"
    return "other"
