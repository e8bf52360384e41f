"""Expert parallelism: a step of a model whose experts lie on several ranks is that of one process."""

import pytest
import torch
from parallel_parity import check
from worker_pool import slow_but

from swift.parallel.layout import Layout

MOE = "qwen3_moe"


@pytest.mark.parametrize("lora", slow_but([False], [False, True]))
def test_with_fsdp(lora):
    share = check(Layout(dp_shard=2, ep=2), MOE, lora=lora)
    assert share < 0.6


@pytest.mark.parametrize("sequence", slow_but([True], [False, True]))
def test_with_tensor_parallelism(sequence):
    share = check(Layout(tp=2, ep=2), MOE, sequence=sequence)
    assert share < 0.65


@pytest.mark.slow
def test_with_context_parallelism():
    check(Layout(cp=2, ep=2), MOE, lora=True)


def test_grouped_products_in_single_precision():
    check(Layout(dp_shard=2, ep=2), MOE, dtype=torch.float32, experts="grouped_mm")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_with_tensor_parallelism_and_fsdp(task, lora):
    check(Layout(dp_shard=2, tp=2, ep=4), MOE, task=task, lora=lora)
    check(Layout(dp_shard=2, tp=2, ep=2), MOE, task=task, lora=lora, sequence=True, packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_recomputed(lora):
    check(Layout(dp_shard=2, ep=2), MOE, lora=lora, again=True)
    check(Layout(tp=2, ep=2), MOE, lora=lora, again=True, sequence=True)


@pytest.mark.slow
def test_copies_of_experts():
    check(Layout(dp_replicate=2, tp=2, ep=2), MOE)


@pytest.mark.slow
def test_in_stages():
    check(Layout(pp=2, dp_shard=2, ep=2), MOE)


@pytest.mark.slow
def test_shards_of_experts():
    check(Layout(dp_shard=2, cp=2, ep=2), MOE)
    check(Layout(dp_replicate=2, dp_shard=2, ep=2), MOE)
