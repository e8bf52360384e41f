"""Memory by part against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swift.config.sections.tuner import TunerSection
from swift.models.facts import ModelFacts
from swift.plan.analytic import (
    FRAMEWORK_BYTES,
    LinearShape,
    Setup,
    activation_bytes_per_token,
    checkpoint_bytes,
    memory_parts,
)
from swift.tuners.registry import count_layer

# 2 layers, h = 8, q = 8, k = 4, f = 16, 32 tokens: 256 + 256 + 2 (64 + 32 + 32 + 64) + 2 (3 x 128) + 40 = 1704
FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    model_type="llama",
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=16,
    vocab_size=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    dtype="bfloat16",
    parts={"embedding": 256, "attention": 384, "mlp": 768, "norm": 40, "head": 256, "other": 0},
    num_active_parameters=1704,
    exact=True,
)
ADAPTED = [
    LinearShape(f"model.layers.{layer}.self_attn.{name}", 8, outputs)
    for layer in range(2)
    for name, outputs in (("q_proj", 8), ("v_proj", 4))
]
LORA = Setup(compute="float32", is_lora=True, trainable=112, tokens=10, adapted=ADAPTED, rank=2, dropout=0.05)
FULL = Setup(compute="bfloat16", is_lora=False, trainable=1704, tokens=10, checkpointing=True, device="cuda")


def test_adapter_parameters() -> None:
    tuner = TunerSection(lora_rank=2)
    counted = sum(count_layer(layer.name, layer.inputs, layer.outputs, tuner) for layer in ADAPTED)
    assert counted == 2 * (2 * (8 + 8) + 2 * (8 + 4)) == 112


def test_activations_of_a_token() -> None:
    # norms 2 (32 + 32), attention 4 (8 + 8) + 2 x 32 + 8, feed-forward 4 x 64; adapters 2 a layer: 2 (8 + 2 x 8)
    assert activation_bytes_per_token(FACTS, LORA) == 128 + 136 + 256 + 48
    # norms 2 (32 + 16), attention 2 (8 + 8) + 2 x 16 + 8, feed-forward 4 x 32, normalised inputs 2 x 16
    assert activation_bytes_per_token(FACTS, FULL) == 96 + 72 + 128 + 32


def test_lora_on_cpu() -> None:
    assert memory_parts(FACTS, LORA) == {
        "weights": 1704 * 4,
        "adapters": 448,
        "gradients": 448,
        "optimizer": 896,
        "activations": 10 * (2 * 568 + 96),
        "logits": 10 * 32 * 4,
        "temporary": 0,
        "framework": FRAMEWORK_BYTES["cpu"],
    }


def test_recomputed_and_offloaded_layers() -> None:
    def kept(**changes: Any) -> int:
        return memory_parts(FACTS, replace(FULL, **changes))["activations"]

    last_norm = 4 * 8 + 2 * 2 * 8
    assert kept() == 10 * (2 * 16 + 328 + last_norm)
    # one layer's input, and that layer again while it is recomputed; the other as it is
    assert kept(recomputed=1) == 10 * (16 + 2 * 328 + last_norm)
    assert kept(recomputed=9) == kept()
    assert kept(checkpointing=False) == 10 * (2 * 328 + last_norm)
    assert kept(offloaded=True) == 10 * (328 + last_norm)
    assert kept(offloaded=True, device="cpu") == kept()


def test_full_training_with_master_weights_and_checkpointing() -> None:
    assert memory_parts(FACTS, FULL) == {
        "weights": 6816,
        "adapters": 0,
        "gradients": 6816,
        "optimizer": 13632,
        "activations": 10 * (2 * 2 * 8 + 328 + 64),
        "logits": 10 * 32 * 8,
        "temporary": 32 * 8 * 4 + 1704 * 2,
        "framework": FRAMEWORK_BYTES["cuda"],
    }


def test_chunk_bounds_logits_and_devices_share() -> None:
    import dataclasses

    parts = memory_parts(FACTS, dataclasses.replace(LORA, chunk=4, model_shares=4, sequence_shares=2))
    assert parts["logits"] == 4 * 32 * 4
    assert parts["weights"] == 1704
    assert parts["activations"] == 5 * (2 * 568 + 96)


@pytest.mark.parametrize(
    ("setup", "only_model", "expected"),
    [
        (LORA, False, 3 * 448),
        (LORA, True, 448),
        (FULL, True, 1704 * 2),
        (FULL, False, 1704 * 2 + 1704 * 4 + 1704 * 8),
    ],
)
def test_checkpoints(setup: Setup, only_model: bool, expected: int) -> None:
    assert checkpoint_bytes(FACTS, setup, only_model=only_model, export_bytes=2) == expected
