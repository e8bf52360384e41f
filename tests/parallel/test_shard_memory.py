"""What the planner says a rank holds of a sharded model, against the bytes that it holds."""

import pytest
import torch
from test_data_parallel import LAYOUTS, engine_of, micro_batches
from worker_pool import pool

from swift.config.bind import resolve
from swift.objectives.sft import SftObjective
from swift.plan.plan import make_plan


def held(rank, folder, tuner):
    """Bytes of weights, gradients and optimizer of this rank after a step."""
    engine = engine_of(folder, LAYOUTS["shards"], rank, tuner=tuner, dtype=torch.float32)
    engine.forward_backward(micro_batches("padded"), SftObjective())

    def size(tensors):
        return sum(t.to_local().numel() * t.element_size() for t in tensors if hasattr(t, "to_local"))

    parameters = list(engine.model.parameters())
    weights, gradients = size(parameters), size(p.grad for p in parameters if p.grad is not None)
    optimizer = engine.parameter_sets["default"].optimizer
    optimizer.step()
    return weights, gradients, size(value for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_shards_weigh_what_the_plan_says(tiny_model_dir, tmp_path, tuner):
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    words = [
        "--model",
        str(tiny_model_dir),
        "--dataset",
        str(data),
        "--device",
        "cpu",
        "--torch_dtype",
        "float32",
    ]
    words += ["--tuner_type", tuner, "--dp_size", "2", *(["--lora_rank", "4"] if tuner == "lora" else [])]
    sharded = make_plan(resolve("sft", [*words, "--fsdp", "full"], planning=True)).memory["parts"]
    copies = make_plan(resolve("sft", words, planning=True)).memory["parts"]
    for weights, gradients, optimizer in pool(2).run(held, tiny_model_dir, tuner):
        assert weights == pytest.approx(sharded["weights"] + sharded["adapters"], rel=0.02)
        assert optimizer == pytest.approx(sharded["optimizer"], rel=0.02)
        assert gradients == pytest.approx(optimizer / 2, rel=0.02)
    for part in ("weights", "optimizer"):
        assert copies[part] == pytest.approx(2 * sharded[part], rel=1e-6)
