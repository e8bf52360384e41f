"""Other methods than LoRA on bitsandbytes layers: they learn beside a base that stays, and are stored and loaded."""

from __future__ import annotations

import pytest
import torch

from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError
from swift.models.load import load_model
from swift.models.quantised import is_quantised_linear
from swift.tuners.apply import apply_tuner
from swift.tuners.peft_format import load_adapter, save_adapter
from swift.tuners.registry import METHODS

TOKENS = torch.arange(3, 19)[None]
RATES = {"ia3": 1e-1, "vera": 5e-2, "reft": 5e-2}
OPTIONS = {"dora": {"use_dora": True}, "oft": {"tuner_type": "oft", "oft_block_size": 8}}
REFUSED = (("loha", 4), ("lokr", 4), ("dora", 8))
PEFT_METHODS = ["dora", *(name for name in METHODS if name != "lora")]


def quantised(folder, bits):
    return load_model(
        folder, dtype=torch.float32, quantization=QuantizationSection(quant_method="bnb", quant_bits=bits)
    )


def section(name):
    return TunerSection(**OPTIONS.get(name, {"tuner_type": name}))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [*PEFT_METHODS, "reft", "adapter"])
def test_learns_and_loads(name, bits, tiny_model_dir, tmp_path):
    model = quantised(tiny_model_dir, bits)
    if (name, bits) in REFUSED:
        with pytest.raises(ConfigError, match=f"cannot sit on weights of {bits} bits"):
            apply_tuner(model, section(name))
        return
    codes = {key: one.weight.clone() for key, one in model.named_modules() if is_quantised_linear(one)}
    assert len(codes) == 14
    tuned = apply_tuner(model, section(name), total_steps=10)
    optimizer = torch.optim.Adam(tuned.named_trainable().values(), lr=RATES.get(name, 1e-2))
    losses = []
    for _ in range(8):
        model.train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = [one.weight for one in model.modules() if is_quantised_linear(one)]
    assert all(torch.equal(old, new) for old, new in zip(codes.values(), after, strict=True))

    save_adapter(model, tmp_path)
    again = quantised(tiny_model_dir, bits)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    base = logits(quantised(tiny_model_dir, bits))
    with tuned.adapter_disabled():
        assert torch.equal(logits(model), base)
    assert (logits(model) - base).abs().max() > 1e-2
