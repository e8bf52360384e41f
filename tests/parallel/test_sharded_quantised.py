"""QLoRA in shards: the step of one process on the same 4-bit base, whose bytes every rank has a part of."""

import pytest
import torch
from parallel_parity import engine_of, step_of, worst
from test_parallel_runs import COMMON, alone, data, rows_of, same, train_on  # noqa: F401
from worker_pool import layout_id, mesh_of, pool

from swift.config.sections.parallel import ParallelSection
from swift.config.sections.quantization import QuantizationSection
from swift.models.head import split_head
from swift.models.load import load_model
from swift.models.sharded import local
from swift.parallel.data_parallel import Ranks, ShardOptions
from swift.parallel.distribute import distribute
from swift.parallel.layout import Layout
from swift.parallel.world import World
from swift.tuners.apply import attach_adapter
from swift.tuners.lora import AdapterSpec

NF4 = {"quant_method": "bnb", "quant_bits": 4}


def quantised(folder, double):
    """On a 4-bit base, LoRA whose B is not zero."""
    section = QuantizationSection(**NF4, bnb_4bit_use_double_quant=double)
    model = load_model(folder, dtype=torch.float32, quantization=section)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    attach_adapter(model, dict.fromkeys(names, AdapterSpec(4, 8.0)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def base_bytes(model):
    """What this process holds of the adapted layers' weights and scales (of one process: in bitsandbytes' layers)."""
    weights = [p for name, p in model.named_parameters() if "_proj.base." in name]
    scales = [p.quant_state.absmax for p in weights if hasattr(p, "quant_state")]
    return sum(local(one).numel() * one.element_size() for one in (*weights, *scales))


def step(rank, folder, layout, double):
    model = quantised(folder, double)
    before = base_bytes(model)
    options = {}
    if layout is not None:
        world = World(rank, layout, mesh_of(layout))
        section = ParallelSection(context_parallel_size=layout.cp)
        divided = distribute(model, world, split_head(model), section, ShardOptions())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        options = {"ranks": Ranks(world, trained, **divided.parts), "split": lambda _: divided.split}
    engine = engine_of(model, **options)
    batches, objective = step_of("sft")
    own = batches if layout is None else batches[engine.ranks.world.data_rank :: layout.dp]
    output = engine.forward_backward(own, objective)
    parameters = engine.parameter_sets["default"].parameters
    if layout is None:
        return float(output.loss), {name: p.grad for name, p in parameters.items()}, before, before
    (loss,) = engine.ranks.world.sums([float(output.loss)])
    return (
        loss,
        {name: engine.ranks.whole(p.grad) for name, p in parameters.items()},
        before,
        base_bytes(model),
    )


@pytest.mark.parametrize(
    ("layout", "double"),
    [
        (Layout(dp_shard=2), True),
        pytest.param(Layout(dp_shard=2), False, marks=pytest.mark.slow),
        pytest.param(Layout(dp_replicate=2, dp_shard=2), True, marks=pytest.mark.slow),
        pytest.param(Layout(dp_shard=2, cp=2), True, marks=pytest.mark.slow),
    ],
    ids=layout_id,
)
def test_a_step_is_that_of_one_process(tiny_model_dir, layout, double):
    pytest.importorskip("bitsandbytes")
    wanted_loss, wanted, *_ = step(0, tiny_model_dir, None, double)
    for loss, found, whole, held in pool(layout.world_size).run(step, tiny_model_dir, layout, double):
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert worst(found, wanted)[0] < 1e-5
        assert held == pytest.approx(whole / (layout.dp_shard * layout.cp), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "rlhf"])
def test_a_run_is_that_of_one_process(tiny_model_dir, data, tmp_path, monkeypatch, command):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    file = "pairs.jsonl" if command == "rlhf" else "chat.jsonl"
    options = {**COMMON, **NF4, "model": str(tiny_model_dir), "dataset": str(data / file)}
    options |= {"torch_dtype": "float32"}
    options |= {"rlhf_type": "dpo"} if command == "rlhf" else {"gradient_checkpointing": True}
    expected = rows_of(alone(command, {**options, "output_dir": str(tmp_path / "one")}, monkeypatch))
    folder, _ = pool(2).run(
        train_on, command, {**options, "fsdp": "full", "output_dir": str(tmp_path / "two")}
    )
    same(rows_of(folder), expected, rel=1e-4)
