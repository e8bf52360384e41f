"""Memory by part against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swift.config.sections.tuner import TunerSection
from swift.models.facts import ModelFacts
from swift.plan.adapters import adapter_memory
from swift.plan.analytic import (
    CONTEXT_BYTES,
    RESERVE_SHARE,
    AdapterMemory,
    LinearShape,
    Setup,
    checkpoint_bytes,
    kept_bytes_per_token,
    memory_parts,
    moments,
    with_overhead,
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
# of a token, each of the four adapters keeps its projection (2 x 4) and a mask of its 8 inputs (2 bytes each)
ADAPTERS = AdapterMemory(per_token=4 * (8 + 16))
LORA = Setup(compute="float32", is_lora=True, trainable=112, tokens=10, adapters=ADAPTERS)
FULL = Setup(
    compute="bfloat16",
    is_lora=False,
    trainable=1704,
    trains_head=True,
    tokens=10,
    checkpointing=True,
    device="cuda",
)


def test_adapter_parameters() -> None:
    tuner = TunerSection(lora_rank=2)
    counted = sum(count_layer(layer.name, layer.inputs, layer.outputs, tuner) for layer in ADAPTED)
    assert counted == 2 * (2 * (8 + 8) + 2 * (8 + 4)) == 112


def test_what_a_layer_keeps_of_a_token() -> None:
    # norms 2 (32 + 4) + 2 x 32; attention 2 x 4 (8 + 4) + 4 x 2; feed-forward 4 x 64; adapters 2 (8 + 2 x 8)
    assert kept_bytes_per_token(FACTS, LORA) == 136 + 104 + 256 + 48
    # several documents in a row: their results once more, joined
    assert kept_bytes_per_token(FACTS, replace(LORA, documents=2)) == 544 + 4 * 8
    # queries and values are adapted: what the feed-forward layers and the output projection take is not kept
    partial = replace(LORA, documents=2, adapters=replace(ADAPTERS, reads=frozenset(["attention"])))
    assert kept_bytes_per_token(FACTS, partial) == 544 - 32 - 64
    # autocast: norms 2 (32 + 4) + normalised 2 x 32 + five casts 5 x 16; attention 2 x 2 (8 + 4) + 8; 4 x 32
    assert kept_bytes_per_token(FACTS, FULL) == 216 + 56 + 128


LAST_NORM = 24 + 2 * 4 * 4 + 8 * 8  # ids, positions, targets; rotations; input and result of the last norm


def test_lora_on_cpu() -> None:
    assert memory_parts(FACTS, LORA) == {
        "weights": 1704 * 4,
        "adapters": 448,
        "optimizer": 896,
        "gradients": 448,
        # the first norm keeps nothing; hidden states, Jacobian and a chunk's share of both: 4 x 32
        "activations": 10 * (2 * 544 - 36 + LAST_NORM) + 10 * 4 * 32,
        "logits": 10 * 32 * 4,
        "temporary": 0,
    }
    assert moments(FACTS, replace(LORA, accumulates=False))["loss"]["gradients"] == 0


def test_what_adapters_change() -> None:
    tuner = TunerSection(lora_rank=2, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    found = adapter_memory(FACTS, {}, ADAPTED, tuner, 4, False)
    assert found == replace(ADAPTERS, reads=frozenset(["attention"]))
    on_device = adapter_memory(FACTS, {}, ADAPTED, tuner, 2, True)
    assert on_device.per_token == 4 * (2 * 2 + 8)
    # PiSSA subtracts its start: twice the rank, and both matrices [2 x 2, inputs + outputs] in float32
    pissa = adapter_memory(FACTS, {}, ADAPTED, tuner.model_copy(update={"init_weights": "pissa"}), 4, False)
    assert (pissa.per_token, pissa.once) == (4 * (16 + 16), 2 * 4 * 4 * (16 + 12))
    upper = adapter_memory(FACTS, {}, ADAPTED[2:], tuner, 4, False)
    assert upper.resting == 1
    kept = moments(FACTS, replace(LORA, adapters=replace(ADAPTERS, resting=1)))["loss"]["activations"]
    assert kept == 10 * (544 - 36 + LAST_NORM) + 10 * 4 * 32


def test_tuners_that_leave_layers_alone() -> None:
    def memory(**options: Any) -> AdapterMemory:
        return adapter_memory(FACTS, {}, [], TunerSection(**options), 4, False)

    assert memory(tuner_type="full") == AdapterMemory()
    assert memory(tuner_type="full", lisa_activated_layers=1).trained_share == 0.5
    pro = memory(tuner_type="llamapro", llamapro_num_new_blocks=1)
    assert (pro.resting, pro.trained_share) == (2, 1.0)
    reft = memory(tuner_type="reft", reft_rank=3, reft_layers=[1])
    assert (reft.resting, reft.per_token, reft.once, reft.reads) == (2, 4 * (8 + 3), 8 * 3 * 8, frozenset())
    shapes = {"model.embed_tokens.weight": (32, 8), "model.layers.0.mlp.up_proj.weight": (16, 8),
              "model.layers.1.mlp.up_proj.weight": (16, 8)}  # fmt: skip
    frozen = TunerSection(tuner_type="full", freeze_parameters=["model.embed_tokens", "model.layers.0"])
    assert adapter_memory(FACTS, shapes, [], frozen, 4, False).resting == 1


def test_recomputed_and_offloaded_layers() -> None:
    def kept(**changes: Any) -> float:
        setup = replace(FULL, **changes)
        return moments(FACTS, setup)["backward of the last layer"]["activations"]

    rest = 24 + 2 * 2 * 4 + 6 * 8 + 2 * 8
    assert kept() == 10 * (2 * 32 + 400 + rest)  # the stream is float32 under autocast
    # one layer's input; the other layer as it is, and nothing is recomputed when the backward pass begins
    assert kept(recomputed=1) == 10 * (32 + 400 + rest)
    assert kept(recomputed=9) == kept()
    assert kept(checkpointing=False) == 10 * (2 * 400 + rest)
    assert kept(offloaded=True) == 10 * (400 + rest)
    assert kept(offloaded=True, device="cpu") == kept()


def test_full_training_with_master_weights_and_checkpointing() -> None:
    assert memory_parts(FACTS, FULL) == {
        "weights": 6816,
        "adapters": 0,
        "optimizer": 13632,
        "gradients": 6816,
        "activations": 10 * (2 * 32 + 104) + 10 * 2 * 8,
        "logits": 10 * 32 * 6,
        "temporary": 1704 * 2 + 256 * 6,  # casts of all weights; the head's gradient, summed and of a chunk
    }
    # Long rows: the layer that is recomputed outweighs the loss.
    assert memory_parts(FACTS, replace(FULL, tokens=100, chunk=10))["activations"] == 100 * (
        2 * 32 + 104 + 400
    )


def test_an_update_that_needs_room() -> None:
    parts = memory_parts(FACTS, replace(FULL, tokens=1, update_numbers=9.0))
    assert (parts["temporary"], parts["activations"]) == (9 * 256 * 4, 0)


def test_overhead_is_for_devices() -> None:
    parts = memory_parts(FACTS, LORA)
    assert with_overhead(parts, "cpu") == {**parts, "reserve": 0, "context": CONTEXT_BYTES["cpu"]}
    passing = parts["gradients"] + parts["activations"] + parts["logits"]
    assert with_overhead(parts, "cuda")["reserve"] == round(RESERVE_SHARE * passing)


def test_chunk_bounds_logits_and_devices_share() -> None:
    shared = replace(LORA, chunk=4, model_shares=4)
    assert moments(FACTS, shared)["loss"]["logits"] == 4 * 32 * 4
    assert memory_parts(FACTS, shared)["weights"] == 1704
    whole, half = (moments(FACTS, replace(LORA, sequence_shares=shares))["loss"] for shares in (1, 2))
    assert whole["activations"] - half["activations"] == 5 * (2 * 544 - 36 + LAST_NORM) + 5 * 2 * 32


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
