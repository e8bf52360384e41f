"""Copies and shards: the gradients, norms and curves of one process, to rounding, however a step is dealt out."""

import pytest
import torch
from test_native import documents, packed, padded
from worker_pool import mesh_of, pool, slow_but

from swift.data.batching import deal
from swift.models.load import load_model
from swift.objectives.sft import SftObjective
from swift.parallel.engine import ParameterSet
from swift.parallel.layout import Layout
from swift.parallel.native import NativeEngine
from swift.tuners.lora import AdapterSpec
from swift.tuners.targets import decoder_layers

LAYOUTS = {
    "copies": Layout(dp_replicate=2),
    "shards": Layout(dp_shard=2),
    "shards in host memory": Layout(dp_shard=2),
    "copies of shards": Layout(dp_replicate=2, dp_shard=2),
}


def engine_of(folder, layout, rank, *, tuner, dtype=torch.float64, offload=False, lr=1e-2):
    """The engine that a rank has; of the whole run for the layout of one process."""
    from swift.parallel.data_parallel import Ranks, ShardOptions, shard_model
    from swift.parallel.world import World
    from swift.tuners.apply import attach_adapter

    world = World() if layout.world_size == 1 else World(rank, layout, mesh_of(layout))
    model = load_model(folder, dtype=dtype)
    if tuner == "lora":
        names = [name for name, module in model.named_modules() if name.endswith("_proj")]
        attach_adapter(model, dict.fromkeys(names, AdapterSpec(4, 8.0)), dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():  # B = 0 would leave A without gradients
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.1
    split = NativeEngine(model, [], device=torch.device("cpu"), dtype=dtype)._split
    root = None
    if layout.dp_shard > 1:
        options = ShardOptions(offload=offload)
        root = shard_model(model, decoder_layers(model)[1], world, options)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr)
    sets = [ParameterSet("default", parameters, optimizer, lambda step: lr, 0.5)]
    ranks = Ranks(world, parameters, root) if layout.world_size > 1 else None
    return NativeEngine(
        model, sets, device=torch.device("cpu"), dtype=dtype, chunk_size=8, split=lambda _: split, ranks=ranks
    )


def micro_batches(mode, seed=0):
    """Five micro-batches: they do not divide evenly among ranks."""
    docs = documents()
    docs = docs[seed % len(docs) :] + docs[: seed % len(docs)]
    join = packed if mode == "packed" else padded
    parts = [docs[:2], docs[2:3], docs[3:4], docs[4:5], docs[5:]]
    return [join(part) for part in parts]


def empty():
    batch = padded([torch.tensor([0, 0, 0, 0])])
    batch.targets[:] = -100
    batch.num_targets = batch.num_tokens = 0
    return batch


def step_of(rank, folder, name, mode, tuner, dtype=torch.float64):
    """Gradients, norm, loss and counts of one step."""
    layout = LAYOUTS.get(name, Layout())
    engine = engine_of(folder, layout, rank, tuner=tuner, dtype=dtype, offload="host" in name)
    batches = deal(micro_batches(mode), (layout.data_rank(rank), layout.dp), empty())
    output = engine.forward_backward(batches, SftObjective())
    whole = engine.ranks.whole if engine.ranks else lambda tensor: tensor
    gradients = {
        key: whole(p.grad).clone()
        for key, p in engine.parameter_sets["default"].parameters.items()
        if p.grad is not None
    }
    loss = float(output.loss)
    if engine.ranks:
        (loss,) = engine.ranks.world.sums([loss])
    norm = float(engine.clip()["default"])
    clipped = {
        key: whole(p.grad).clone()
        for key, p in engine.parameter_sets["default"].parameters.items()
        if p.grad is not None
    }
    return gradients, clipped, norm, loss, output.counts


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) <= tolerance * scale, key


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("mode", slow_but(["packed"], ["padded", "packed"]))
@pytest.mark.parametrize("name", slow_but(["copies", "shards"], LAYOUTS))
def test_a_step_is_that_of_one_process(tiny_model_dir, name, mode, tuner):
    expected = step_of(0, tiny_model_dir, "one", mode, tuner)
    results = pool(LAYOUTS[name].world_size).run(step_of, tiny_model_dir, name, mode, tuner)
    for gradients, clipped, norm, loss, counts in results:
        close(gradients, expected[0], 1e-10)
        close(clipped, expected[1], 1e-10)
        assert norm == pytest.approx(expected[2], rel=1e-10)
        assert loss == pytest.approx(expected[3], rel=1e-10)
        assert counts.denominators.target_weight == pytest.approx(
            expected[4].denominators.target_weight, rel=1e-12
        )
        assert (counts.num_tokens, counts.num_targets) == (expected[4].num_tokens, expected[4].num_targets)


@pytest.mark.parametrize("name", ["copies", "shards"])
def test_a_step_in_single_precision(tiny_model_dir, name):
    expected = step_of(0, tiny_model_dir, "one", "padded", "full", torch.float32)
    for found in pool(2).run(step_of, tiny_model_dir, name, "padded", "full", torch.float32):
        close(found[0], expected[0], 1e-5)
        assert found[3] == pytest.approx(expected[3], rel=1e-5)


def curve_of(rank, folder, name, tuner):
    """Losses of 20 clipped steps."""
    layout = LAYOUTS.get(name, Layout())
    engine = engine_of(folder, layout, rank, tuner=tuner)
    losses = []
    for step in range(20):
        batches = deal(micro_batches("packed", step), (layout.data_rank(rank), layout.dp), empty())
        loss = float(engine.forward_backward(batches, SftObjective()).loss)
        losses += engine.ranks.world.sums([loss]) if engine.ranks else [loss]
        engine.clip()
        engine.step(step)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_twenty_steps_are_those_of_one_process(tiny_model_dir, name, tuner):
    expected = curve_of(0, tiny_model_dir, "one", tuner)
    assert expected[-1] < expected[0] - 0.5
    for losses in pool(2).run(curve_of, tiny_model_dir, name, tuner):
        assert losses == pytest.approx(expected, rel=1e-8)


def _add_late(rank, folder):
    from swift.core.errors import SwiftError
    from swift.parallel.data_parallel import Ranks

    engine = engine_of(folder, LAYOUTS["shards"], rank, tuner="lora")
    late = {"late": torch.nn.Parameter(torch.zeros(3))}
    try:
        Ranks(engine.ranks.world, {**engine.parameter_sets["default"].parameters, **late}, engine.ranks.root)
    except SwiftError as error:
        return error.render()


def test_a_parameter_that_no_rank_shares_is_refused(tiny_model_dir):
    (text, _) = pool(2).run(_add_late, tiny_model_dir)
    assert text.startswith("late: the gradients of 1 parameters would stay those of one rank")
