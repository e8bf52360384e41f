"""Adapters on bitsandbytes layers against PEFT's on the same layers, and what may not be done with such layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ModelError
from swift.models.load import load_model
from swift.models.quantised import dequantised
from swift.tuners.apply import apply_tuner, attach_adapter
from swift.tuners.lora import AdapterSpec, LoraLinear, is_linear, lora_layers
from swift.tuners.merge import merge_adapter
from swift.tuners.peft_format import load_adapter, save_adapter
from swift.tuners.switch import AdapterSwitch

NF4 = QuantizationSection(quant_method="bnb", quant_bits=4)
INT8 = QuantizationSection(quant_method="bnb", quant_bits=8)


@pytest.fixture(scope="module", params=[4, 8], ids=["nf4", "int8"])
def base(request, tiny_model_dir):
    section = NF4 if request.param == 4 else INT8
    return load_model(tiny_model_dir, dtype=torch.float32, quantization=section)


class Packed(nn.Module):
    """A stand-in for a quantised layer: its weight is stored in 8 bits and unpacked for each product."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def unpacked(self):
        return self.weight.float() / 127

    def forward(self, x):
        return x @ self.unpacked().t()


@pytest.mark.parametrize("inputs_have_gradients", [True, False])
def test_adapter_on_an_opaque_layer_against_plain_operations(inputs_have_gradients):
    layer = LoraLinear(Packed(12, 7), AdapterSwitch("default"))
    layer.add_adapter("default", AdapterSpec(rank=3, alpha=6), seed=1)
    layer.lora_B["default"].data.normal_(generator=torch.Generator().manual_seed(2))
    a, b = (one["default"].detach().clone().requires_grad_() for one in (layer.lora_A, layer.lora_B))
    x = torch.randn(2, 5, 12, requires_grad=inputs_have_gradients)
    other = x.detach().clone().requires_grad_(inputs_have_gradients)
    expected = other @ layer.base.unpacked().t() + 2 * (other @ a.t()) @ b.t()
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B["default"].grad, b.grad, rtol=1e-4, atol=1e-4)
    if inputs_have_gradients:
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert (layer.in_features, layer.out_features) == (12, 7)


def test_dropout_of_the_adapter_is_the_same_in_both_directions():
    """With the base's part taken off, the gradient of x is that of the kept elements alone."""
    layer = LoraLinear(Packed(12, 7), AdapterSwitch("default"))
    layer.add_adapter("default", AdapterSpec(rank=3, alpha=6, dropout=0.5), seed=1)
    layer.lora_B["default"].data.fill_(1.0)
    x = torch.ones(4, 12, requires_grad=True)
    layer.train()(x).sum().backward()
    own = x.grad - layer.base.unpacked().sum(0)
    kept = own.abs() > 1e-6
    update = layer.delta("default").sum(0)
    torch.testing.assert_close(own, kept * update * 2, rtol=1e-3, atol=1e-3)
    assert 0 < kept.sum() < kept.numel()


def test_refuses_to_merge_into_an_opaque_layer():
    model = nn.Sequential(Packed(12, 7))
    attach_adapter(model, {"0": AdapterSpec(rank=2, alpha=4)})
    with pytest.raises(ModelError, match="quantised"):
        merge_adapter(model)


def tuned(base, **options):
    """A fresh adapter on ``base`` with a B that is not zero."""
    names = [name for name, module in base.named_modules() if name.endswith("q_proj") and is_linear(module)]
    attach_adapter(base, dict.fromkeys(names, AdapterSpec(rank=4, alpha=8, **options)))
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(base).values():
        layer.lora_B["default"].data.normal_(0, 0.1, generator=generator)
    return lora_layers(base)


def unwrap(base):
    for name, layer in lora_layers(base).items():
        base.set_submodule(name, layer.base)


def test_output_and_gradients_equal_pefts(base):
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit as Peft4bit
    from peft.tuners.lora.bnb import Linear8bitLt as Peft8bit

    ours = next(iter(tuned(base).values())).train()
    wrapper = Peft4bit if type(ours.base).__name__ == "Linear4bit" else Peft8bit
    theirs = wrapper(ours.base, "default", LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8).train()
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A["default"])
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B["default"])
    results = []
    for layer in (ours, theirs):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.lora_A["default"].grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B["default"].grad, theirs.lora_B["default"].weight.grad)
    unwrap(base)


def test_head_and_embedding_keep_their_precision_and_merging_is_refused(base):
    assert base.lm_head.weight.dtype == base.model.embed_tokens.weight.dtype == torch.float32
    tuned(base)
    with pytest.raises(ModelError, match="quantised") as caught:
        merge_adapter(base)
    assert "full-precision" in caught.value.fix
    unwrap(base)


def test_evaluating_first_changes_no_gradient(base):
    """bitsandbytes repacks 4-bit layers on some CPUs at their first evaluation; then no gradient passes them."""
    layers = tuned(base)
    ids = torch.arange(8)[None]

    def gradient():
        base.train()
        base.zero_grad()
        base(input_ids=ids).logits.square().sum().backward()
        return {name: layer.lora_A["default"].grad.clone() for name, layer in layers.items()}

    before = gradient()
    base.eval()
    with torch.no_grad():
        base(input_ids=ids)
    for name, value in gradient().items():
        assert torch.equal(value, before[name]), name
        assert value.abs().max() > 0
    unwrap(base)


def test_adapters_of_one_batch_and_dropout(base):
    layer = next(iter(tuned(base, dropout=0.5).values()))
    layer.add_adapter("other", AdapterSpec(rank=2, alpha=4), seed=5)
    layer.lora_B["other"].data.fill_(0.1)
    x = torch.randn(3, 4, 64)
    layer.eval()
    with torch.no_grad():
        with layer.switch.mixed([("default", 2), (None, 1)]):
            mixed = layer(x)
        with layer.switch.use("default"):
            torch.testing.assert_close(mixed[:2], layer(x[:2]))
        with layer.switch.use(None):
            torch.testing.assert_close(mixed[2:], layer(x[2:]))
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    unwrap(base)


def test_a_stored_adapter_is_loaded_onto_a_quantised_base(base, tmp_path):
    """A packed weight has another shape than its layer: 4 bits have one column of half as many bytes."""
    ids = torch.arange(8)[None]
    tuned(base)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    save_adapter(base, tmp_path)
    unwrap(base)
    load_adapter(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, expected)
    unwrap(base)


def test_pissa_starts_from_the_values_of_a_quantised_base(base):
    """And not from the bytes that these are stored in."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
    apply_tuner(base, TunerSection(init_weights="pissa", lora_rank=4))
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    for layer in lora_layers(base).values():
        u, s, vh = torch.linalg.svd(dequantised(layer.base))
        start_a, start_b = layer.starts["default"]
        found = layer.specs["default"].scaling * start_b @ start_a
        torch.testing.assert_close(found, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
    unwrap(base)


def test_sizes_of_a_packed_layer():
    import bitsandbytes as bnb

    layer = LoraLinear(bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu"), switch=None)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert isinstance(layer.base, nn.Linear) and layer.weight.shape != (32, 64)
