"""Twenty clipped steps in every dimension and combination: losses, norms and all trained weights of one process."""

import pytest
from parallel_parity import curve
from worker_pool import pool

from swift.parallel.layout import Layout

CASES = {
    "tensor": (Layout(tp=2), "qwen3"),
    "ulysses": (Layout(cp=2), "llama"),
    "ring": (Layout(cp=2), "qwen3"),
    "pipeline": (Layout(pp=2), "gemma"),
    "experts x shards": (Layout(dp_shard=2, ep=2), "qwen3_moe"),
    "tensor x shards": (Layout(tp=2, dp_shard=2), "llama"),
    "tensor x pipeline": (Layout(tp=2, pp=2), "qwen3"),
    "pipeline x shards": (Layout(pp=2, dp_shard=2), "llama"),
    "context x shards": (Layout(cp=2, dp_shard=2), "qwen3"),
    "context x tensor": (Layout(cp=2, tp=2), "qwen3"),
    "experts x tensor x shards": (Layout(dp_shard=2, tp=2, ep=2), "qwen3_moe"),
    "pipeline x tensor x shards": (Layout(pp=2, tp=2, dp_shard=2), "gemma"),
    "copies of shards": (Layout(dp_replicate=2, dp_shard=2), "qwen3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["experts", False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name, lora):
    layout, family = CASES[name]
    sequence, ring = layout.tp > 1, 2 if name == "ring" else None
    adapted = lora if family == "qwen3_moe" else bool(lora)
    for (losses, found), (norms, found_norms), moved, error, worst in pool(layout.world_size).run(
        curve, layout, family, adapted, sequence, ring, seconds=600
    ):
        assert losses[-2] < losses[0] - (0.03 if lora else 0.2)  # adapters of rank 4 learn slowly
        assert found == pytest.approx(losses, rel=1e-8)
        assert found_norms == pytest.approx(norms, rel=1e-7)
        assert moved > 1e-6, "every trained parameter has to learn"
        assert error < 1e-8, worst
