"""Kernels that liger binds to single modules stay right when the model is divided afterwards."""

import sys
from types import ModuleType

import pytest
import torch
from parallel_parity import check, tiny

from swift.models.liger import apply_liger_kernels
from swift.parallel.layout import Layout


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp_replicate=2), Layout(dp_shard=2), Layout(tp=2), Layout(cp=2), Layout(pp=2)],
    ids=["copies", "shards", "tensor", "context", "pipeline"],
)
def test_bound_functions_of_a_divided_model(layout, lora):
    check(layout, lora=lora, bound=True)
    if layout.tp > 1:
        check(layout, lora=lora, bound=True, sequence=True)


def test_experts_on_several_devices_keep_their_own_forward(monkeypatch):
    """Everything else keeps liger's."""

    def bind(model, fused_linear_cross_entropy):
        assert not fused_linear_cross_entropy
        for module in (model.model.layers[0].mlp.experts, model.model.norm):
            module.__dict__["forward"] = lambda *args: args[0]

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = bind
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    model = tiny("qwen3_moe", torch.float32)
    apply_liger_kernels(model, experts=False)
    experts, norm = model.model.layers[0].mlp.experts, model.model.norm
    assert "forward" not in experts.__dict__ and "forward" in norm.__dict__
    apply_liger_kernels(model)
    assert "forward" in experts.__dict__
