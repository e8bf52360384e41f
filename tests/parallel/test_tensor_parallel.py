"""Tensor parallelism: a step of a model whose layers ranks share is that of one process."""

import pytest
import torch
from parallel_parity import check
from worker_pool import slow_but

from swift.parallel.accepted import TENSOR_FAMILIES
from swift.parallel.layout import Layout


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "family", slow_but(["qwen3"], ["qwen3", "qwen2", "llama", "gemma", "mistral", "qwen3_moe"])
)
def test_families_on_two_ranks(family, lora, sequence):
    share = check(Layout(tp=2), family, lora=lora, sequence=sequence)
    assert share < (0.95 if family == "qwen3_moe" else 0.82)  # experts, embedding and head are not shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", sorted(set(TENSOR_FAMILIES) - {"qwen3", "qwen2", "llama", "gemma", "mistral", "qwen3_moe"})
)
def test_every_accepted_family(family):
    assert check(Layout(tp=2), family, lora=True, sequence=True) < 0.8


@pytest.mark.parametrize("sequence", slow_but([False], [False, True]))
def test_more_ranks_than_key_value_heads(sequence):
    check(Layout(tp=4), "qwen2", lora=True, sequence=sequence)
    check(Layout(tp=4), "qwen3", task="dpo", packed=False, dtype=torch.float32, sequence=sequence)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_with_context_parallelism(sequence):
    check(Layout(cp=2, tp=2), lora=True, sequence=sequence)
    check(Layout(cp=2, tp=2), "qwen3_moe", sequence=sequence)


@pytest.mark.parametrize("sequence", slow_but([True], [False, True]))
@pytest.mark.parametrize("lora", slow_but([True], [False, True]))
def test_with_fsdp(lora, sequence):
    check(Layout(dp_shard=2, tp=2), lora=lora, sequence=sequence)
    check(Layout(dp_shard=2, tp=2), "gemma", task="dpo", lora=lora, sequence=sequence, dtype=torch.float32)
