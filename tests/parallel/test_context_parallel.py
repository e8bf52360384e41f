"""Context parallelism: gradients of a step whose rows are spread over ranks are those of one process."""

import parallel_parity as parity
import pytest
import torch
import torch.distributed as dist
from parallel_parity import check
from worker_pool import pool, slow_but

from swift.objectives.sft import SftObjective
from swift.parallel.layout import Layout
from swift.parallel.sequence.blocks import block_backward, block_forward, merge, plain_backward, plain_forward
from swift.parallel.sequence.context import ContextParallel


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("task", slow_but(["sft"], ["sft", "dpo"]))
def test_two_ranks(ring, packed, task):
    check(Layout(cp=2), ring=ring, task=task, packed=packed, lora=task == "dpo")


@pytest.mark.parametrize("ring", slow_but([2], [1, 2, 4]))
def test_four_ranks(ring):
    check(Layout(cp=4), ring=ring)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3_moe"])
def test_families(family):
    check(Layout(cp=2), family)
    check(Layout(cp=2), family, ring=1, packed=False, dtype=torch.float32)


def layout_of(rank, ring):
    context = ContextParallel(dist.group.WORLD, ring)
    shard = context.shard(parity.token_batch([[5, 4]]))
    return context.places(16).tolist(), shard.batch.input_ids.shape, shard.attention.lengths


def test_rings_hold_chunks_from_both_ends():
    results = pool(4).run(layout_of, 2)
    assert [places for places, _, _ in results] == [
        [0, 1, 2, 3],  # first ring place: chunks 0 and 3, shared by two ranks
        [12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    for _, shape, lengths in results:
        assert shape == (1, 4)  # 9 tokens padded to 16
        assert lengths == [[5, 4, 7]]


def without_targets(rank):
    batch, objective = [parity.token_batch([[5]])], SftObjective()  # of 4 ranks in a ring, two have no target
    engines = [parity.engine_of(parity.tiny()), parity.distributed_engine(parity.tiny(), rank, Layout(cp=4))]
    grads = []
    for engine in engines:
        engine.forward_backward(batch, objective)
        grads.append({name: p.grad for name, p in engine.parameter_sets["default"].parameters.items()})
    return parity.worst(grads[1], grads[0])


def test_ranks_without_targets():
    assert max(error for error, _ in pool(4).run(without_targets)) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_merge_to_attention_over_all_keys(causal):
    query, key, value, gradient = torch.randn(
        4, 2, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    whole = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, scale=0.3)
    whole.backward(gradient)
    for forward, backward in ((plain_forward, plain_backward), (block_forward, block_backward)):
        # The last five queries and keys are a block of their own; under a causal mask they see the others entirely.
        output, total = torch.zeros_like(query), torch.full(query.shape[:-1], -torch.inf, dtype=torch.float64)
        spans = [slice(0, 7), slice(7, 12)]
        pairs = [(q, k) for q in spans for k in spans if not causal or k.start <= q.start]
        for q, k in pairs:
            parts = (query[:, :, q], key[:, :, k], value[:, :, k])
            merge(output[:, :, q], total[:, :, q], *forward(*parts, causal and q == k, 0.3))
        torch.testing.assert_close(output, whole)
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        for q, k in pairs:
            parts = (
                gradient[:, :, q],
                query[:, :, q],
                key[:, :, k],
                value[:, :, k],
                output[:, :, q],
                total[:, :, q],
            )
            for where, total_sum, part in zip(
                (q, k, k), sums, backward(*parts, causal and q == k, 0.3), strict=True
            ):
                total_sum[:, :, where] += part
        for tensor, total_sum in zip(tensors, sums, strict=True):
            torch.testing.assert_close(total_sum, tensor.grad)


@pytest.mark.parametrize("lora", slow_but([True], [False, True]))
def test_with_fsdp(lora):
    check(Layout(dp_shard=2, cp=2), lora=lora)
    check(Layout(dp_shard=2, cp=2), task="dpo", ring=1, lora=lora, packed=False, dtype=torch.float32)


@pytest.mark.slow
def test_with_copies():
    check(Layout(dp_replicate=2, cp=2), lora=True)


def test_ulysses_has_sliding_windows():
    check(Layout(cp=2), "mistral", ring=1)
