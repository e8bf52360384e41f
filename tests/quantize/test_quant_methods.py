"""Rules of quantising that need no library: what stays, what vLLM reads, what the limits say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swift.core.errors import ConfigError
from swift.models.compare import LogitsDifference
from swift.models.tiny import make_tiny_model
from swift.quantize.layers import kept_layers
from swift.quantize.methods import check_awq_shapes, check_for_vllm, equal_pieces, is_kept
from swift.quantize.parity import Limits


@pytest.mark.parametrize(
    ("name", "is_head", "exclude", "lm_head", "kept"),
    [
        ("lm_head", True, [], False, True),
        ("lm_head", True, [], True, False),
        ("model.layers.0.mlp.gate", False, [], False, True),
        ("model.layers.0.mlp.gate_proj", False, [], False, False),
        ("model.layers.1.mlp.down_proj", False, ["down_proj"], False, True),
        ("model.layers.1.mlp.down_proj", False, ["layers.0.mlp.down_proj"], False, False),
        ("model.layers.1.mlp.xdown_proj", False, ["down_proj"], False, False),
    ],
)
def test_what_stays_in_full_precision(
    name: str, is_head: bool, exclude: list[str], lm_head: bool, kept: bool
) -> None:
    assert is_kept(name, is_head, exclude, lm_head) is kept


def test_kept_layers_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """transformers' routers and fused experts are no linear layers; Mixtral's and the head's names come out right."""
    model = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe")
    assert kept_layers(model, ["q_proj"], False, False) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head",
    ]  # fmt: skip


def test_shapes_that_awq_cannot_quantise_are_named_before(tmp_path: Path) -> None:
    """gptqmodel 7.7 says "AssertionError" when it comes to them."""
    check_awq_shapes({"a.q_proj": (128, 96), "a.up_proj": (256, 192)}, 128)
    with pytest.raises(ConfigError, match="down_proj has 96 inputs") as caught:
        check_awq_shapes({"a.up_proj": (128, 128), "a.down_proj": (96, 128)}, 64)
    assert caught.value.fix == "--group_size 32"
    with pytest.raises(ConfigError, match="o_proj: its 96 outputs") as caught:
        check_awq_shapes({"a.o_proj": (64, 96)}, -1)
    assert "--quant_exclude o_proj" in str(caught.value.fix)
    gpt2 = make_tiny_model(tmp_path / "gpt2", architecture="gpt2", hidden_size=32)  # Conv1D: [in, out]
    with pytest.raises(ConfigError, match="c_attn: its 96 outputs"):
        kept_layers(gpt2, [], False, False, 32)


GOOD: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "checkpoint_format": "gptq",
    },
    "fp8": {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "ignore": [],
        "format": "float-quantized",
    },
}


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        *((name, {}, []) for name in GOOD),
        ("awq", {"zero_point": False}, ["gemm with zero points"]),
        ("awq", {"bits": 8}, ["4 bits, not 8"]),
        ("awq", {"group_size": None}, ["lacks group_size"]),
        ("gptq", {"checkpoint_format": "gptq_v2"}, ["not gptq_v2"]),
        ("fp8", {"format": None, "ignore": None}, ["lacks format", "lacks ignore"]),
        ("fp8", {"quant_method": "bitsandbytes"}, ["no loader for bitsandbytes"]),
    ],
)
def test_what_vllm_reads(tmp_path: Path, base: str, change: dict[str, Any], says: list[str]) -> None:
    stored = {key: value for key, value in {**GOOD[base], **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
    found = check_for_vllm(tmp_path)
    assert len(found) == len(says) and all(text in one for text, one in zip(says, found, strict=True))


def test_calibration_in_pieces_of_one_length() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]
    assert equal_pieces(rows, 3, 10) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert equal_pieces(rows, 2, 2) == [[1, 2], [5, 6]]  # spread over all that there is
    assert equal_pieces(rows, 512, 128) == [list(range(1, 12))]
    assert equal_pieces([], 512, 128) == []


def test_limits() -> None:
    found = LogitsDifference(1.0, 0.1, 2.0, 0.01, 0.9, 10.0, 10.5, 100, 90)
    assert found.perplexity_increase == pytest.approx(0.05) and Limits(0.06, 0.02, 0.85).broken(found) == []
    assert len(Limits(0.04, 0.005, 0.95).broken(found)) == 3
    assert Limits(0.04).broken(replace(found, perplexity_after=None)) == []
    broken = replace(found, mean=math.nan, kl=math.nan, perplexity_after=math.nan)
    assert len(Limits(0.06, 0.02).broken(broken)) == 2 and Limits().broken(broken) == [
        "logits are not finite"
    ]
