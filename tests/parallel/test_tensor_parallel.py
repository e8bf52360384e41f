"""Tensor parallelism: gradients of a step of a model that ranks share are those of one process."""

import parallel_parity as parity
import pytest
import torch
from worker_pool import mesh_of, pool

from swift.core.errors import ConfigError
from swift.models.sharded import local
from swift.parallel.layout import Layout
from swift.parallel.sequence.context import ContextParallel
from swift.parallel.tensor import apply_tensor_parallel, check_tensor_parallel


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(rank, layout, sequence, family, task, packed, dtype, lora, changes):
    wanted_loss, wanted = parity.expected(parity.tiny(family, dtype, lora=lora, **changes), task, packed)
    model = parity.tiny(family, dtype, lora=lora, **changes)
    mesh = mesh_of(layout)
    tensor = apply_tensor_parallel(model, mesh["tp"], sequence=sequence)
    context = ContextParallel(mesh["cp"].get_group(), layout.cp) if layout.cp > 1 else None
    batches, objective = parity.step_of(task, packed)
    if layout.dp_shard > 1:
        parity.shard_layers(model, mesh["dp_shard"])
        objective = parity.OfAll(objective, batches)
        batches = batches[mesh.get_local_rank("dp_shard") :: layout.dp_shard]
    engine = parity.engine_of(model, task, tensor=tensor, context=context)
    loss = engine.forward_backward(batches, objective).loss
    torch.distributed.all_reduce(loss, group=mesh["dp_shard"].get_group())
    found = {}
    for name, parameter in engine.parameter_sets["default"].parameters.items():
        if context:
            torch.distributed.all_reduce(local(parameter.grad), group=context.group)
        found[name] = whole(parameter.grad)
    split = sum(local(parameter).numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return abs(float(loss) - wanted_loss) / abs(wanted_loss), *parity.worst(found, wanted), split / total


def check(layout, family="qwen3", task="sft", packed=True, dtype=torch.float64, lora=False, sequence=False, **changes):
    results = pool(layout.world_size).run(step, layout, sequence, family, task, packed, dtype, lora, changes)
    for loss, gradient, name, share in results:
        assert loss < parity.LIMITS[dtype], loss
        assert gradient < parity.LIMITS[dtype], (gradient, name)
        assert share < (0.95 if "moe" in family else 0.9)  # experts are not shared by ranks of tp


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gemma", "mistral", "qwen3_moe"])
def test_families_on_two_ranks(family, lora, sequence):
    check(Layout(tp=2), family, lora=lora, sequence=sequence)


@pytest.mark.parametrize("sequence", [False, True])
def test_more_ranks_than_key_value_heads(sequence):
    check(Layout(tp=4), "qwen2", lora=True, sequence=sequence)
    check(Layout(tp=4), "qwen3", task="dpo", packed=False, dtype=torch.float32, sequence=sequence)


@pytest.mark.parametrize("sequence", [False, True])
def test_with_context_parallelism(sequence):
    check(Layout(cp=2, tp=2), lora=True, sequence=sequence)
    check(Layout(cp=2, tp=2), "qwen3_moe", sequence=sequence)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_with_fsdp(lora, sequence):
    check(Layout(dp_shard=2, tp=2), lora=lora, sequence=sequence)
    check(Layout(dp_shard=2, tp=2), "gemma", task="dpo", lora=lora, sequence=sequence, dtype=torch.float32)


def test_refusals():
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared by 3"):
        check_tensor_parallel(parity.tiny().config, 3)
    with pytest.raises(ConfigError, match="not there for phi3"):
        check_tensor_parallel(parity.tiny("phi3").config, 2)
