"""LoRA on fused experts that lie on several ranks, or in shards: a step is that of one process."""

import pytest
from parallel_parity import check
from worker_pool import layout_id

from swift.parallel.layout import Layout

MOE = "qwen3_moe"


def test_in_shards():
    assert check(Layout(dp_shard=2), MOE, lora="experts") < 0.55


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2),
        pytest.param(Layout(tp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(dp_shard=2, tp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(dp_shard=2, cp=2, ep=4), marks=pytest.mark.slow),
        pytest.param(Layout(dp_replicate=2, tp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, dp_shard=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), marks=pytest.mark.slow),
    ],
    ids=layout_id,
)
def test_on_several_ranks(layout):
    check(layout, MOE, lora="experts")


@pytest.mark.slow
def test_recomputed():
    check(Layout(dp_shard=2, ep=2), MOE, lora="experts", again=True)
