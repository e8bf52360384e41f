"""Pipeline parallelism: a step of a model whose layers lie on several ranks is that of one process."""

import parallel_parity as parity
import pytest
import torch
from parallel_parity import check
from worker_pool import pool, slow_but

from swift.parallel.accepted import PIPELINE_FAMILIES
from swift.parallel.layout import Layout
from swift.parallel.pipeline import SCHEDULES, split_layers
from swift.tuners.apply import tuned_model


def test_layers_left_over_go_to_the_middle():
    assert [list(part) for part in split_layers(6, 4)] == [[0], [1, 2], [3, 4], [5]]
    assert [len(part) for part in split_layers(7, 2)] == [4, 3]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", slow_but(["gemma"], ["qwen3", "llama", "gemma"]))
def test_families(family, lora):
    share = check(Layout(pp=2), family, lora=lora, layers=3)
    assert share < 0.8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    check(Layout(pp=2), "llama", schedule=schedule, layers=4)
    check(Layout(pp=2), "qwen3", task="dpo", packed=False, lora=True, schedule=schedule, layers=4)


def values(rank, layout, schedule):
    """Log-probabilities of batches of several shapes by the pipeline and by one process, and a DPO reference pass."""
    batches = [parity.preference_batch([[13, 9], [20, 11]]), parity.preference_batch([[5, 17]])]
    alone = parity.engine_of(parity.tiny(lora=True, layers=4), "dpo")
    model = parity.tiny(lora=True, layers=4)
    engine = parity.distributed_engine(model, rank, layout, "dpo", schedule=schedule)
    for one in (alone, engine):
        one.reference = tuned_model(one.model).adapter_disabled
    pairs = [(engine.token_outputs(batch).logprobs, alone.token_outputs(batch).logprobs) for batch in batches]
    for batch in batches:
        batch.reference = None
        pairs.append((engine.reference_sums(batch), alone.reference_sums(batch)))
    return max(float((found - wanted).abs().max()) for found, wanted in pairs)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_values_without_gradients(schedule):
    assert max(pool(2).run(values, Layout(pp=2), schedule)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_with_tensor_parallelism(sequence, lora):
    check(Layout(pp=2, tp=2), "llama", layers=3, lora=lora, sequence=sequence)
    check(Layout(pp=2, tp=2), task="dpo", lora=lora, sequence=sequence, packed=False, dtype=torch.float32)


@pytest.mark.parametrize("lora", slow_but([True], [False, True]))
def test_with_fsdp(lora):
    check(Layout(pp=2, dp_shard=2), "llama", layers=3, lora=lora)
    check(Layout(pp=2, dp_shard=2), layers=4, lora=lora, schedule="interleaved_1f1b")
    check(Layout(pp=2, dp_shard=2), "gemma", task="dpo", lora=lora, packed=False, dtype=torch.float32)


@pytest.mark.slow
def test_with_copies():
    check(Layout(pp=2, dp_replicate=2), "llama", lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [1, 2])
def test_with_context_parallelism(ring):
    check(Layout(pp=2, cp=2), lora=True, ring=ring)
    check(Layout(pp=2, cp=2), "gemma", task="dpo", ring=ring)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_with_tensor_parallelism_and_fsdp(task, lora):
    check(Layout(pp=2, dp_shard=2, tp=2), "llama", task=task, lora=lora)
    check(Layout(pp=2, dp_shard=2, tp=2), "qwen3", task=task, lora=lora, packed=False, sequence=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", PIPELINE_FAMILIES)
def test_every_accepted_family(family):
    check(Layout(pp=2), family, lora=family != "qwen3_moe")
