"""torchao, where it is installed on purpose (``make test-extras``): it costs every start a second, so it is no part
of the ordinary test environment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import chat_file, run_training  # noqa: F401
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from swift.cli.merge_lora import merge
from swift.config.bind import resolve
from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError
from swift.models.load import load_model
from swift.models.quantised import is_quantised_linear
from swift.runs.metrics import read_metrics
from swift.train.low_precision import train_in_float8, train_quantisation_aware
from swift.tuners.peft_format import load_adapter

TOKENS = torch.arange(3, 19)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_an_int8_base(run_training: Any, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    options = {"quant_method": "torchao", "max_steps": 6, "save_steps": 3, "num_train_epochs": 9}
    whole = run_training(run_name="whole", **options).folder
    assert losses(whole)[-1] < losses(whole)[0] - 0.05
    cut = tmp_path / "output" / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    run_training(run_name="cut", resume_from_checkpoint=str(cut / "checkpoint-3"), **options)
    files = [folder / "last" / "adapter_model.safetensors" for folder in (cut, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    section = QuantizationSection(quant_method="torchao", quant_bits=8)
    quantised = load_model(tiny_model_dir, dtype=torch.float32, quantization=section)
    assert sum(is_quantised_linear(module) for module in quantised.modules()) == 14
    plain = load_model(tiny_model_dir, dtype=torch.float32)
    before = logits(quantised)
    assert 1e-5 < (before - logits(plain)).abs().max() < 5e-2
    load_adapter(quantised, whole / "last")
    assert (logits(quantised) - before).abs().max() > 1e-2
    words = ["--adapters", str(whole), "--output_dir", str(tmp_path / "merged"), "--device", "cpu"]
    merged = load_model(merge(resolve("merge-lora", words)), dtype=torch.float32)
    load_adapter(plain, whole / "last")
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-4)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 8))


def test_quantisation_aware_training_computes_as_the_quantised_model_will() -> None:
    inputs = torch.randn(5, 64)
    aware, quantised = two_layers(), two_layers()
    section = QuantizationSection(qat_bits=4, qat_activation_bits=8, qat_group_size=32)
    assert train_quantisation_aware(aware, section, head="3") == 2
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(quantised[:3], config)
    assert (quantised(inputs) - two_layers()(inputs)).abs().max() > 1e-3
    torch.testing.assert_close(aware(inputs), quantised(inputs), rtol=0, atol=2e-3)
    aware(inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in aware.parameters())


@pytest.mark.parametrize("options", [{"qat_bits": 4, "qat_activation_bits": 8}, {"qat_bits": 8}])
def test_a_quantisation_aware_run(
    run_training: Any,  # noqa: F811
    tmp_path: Path,
    tiny_model_dir: Path,
    options: dict[str, Any],
) -> None:
    options = {"tuner_type": "full", "learning_rate": 2e-3, "max_steps": 8, "save_steps": 4, **options}
    whole = run_training(run_name="whole", **options).folder
    assert losses(whole)[-1] < losses(whole)[0] - 0.3
    cut = tmp_path / "output" / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    run_training(run_name="cut", resume_from_checkpoint=str(cut / "checkpoint-4"), **options)
    files = [folder / "last" / "model.safetensors" for folder in (cut, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    trained = load_model(whole / "last", dtype=torch.float32)  # an ordinary model folder
    assert (logits(trained) - logits(load_model(tiny_model_dir, dtype=torch.float32))).abs().max() > 0.1


def test_float8_is_near_and_trains() -> None:
    inputs = torch.randn(16, 64)
    layers, plain = two_layers(), two_layers()
    # The last layer has 8 outputs, which the matrix units do not take.
    assert train_in_float8(layers, torch.device("cpu"), head=None, emulate=True) == 2
    difference = (layers(inputs) - plain(inputs)).abs().max()
    assert 1e-4 < difference < 0.1 * plain(inputs).abs().max()
    layers(inputs).square().mean().backward()
    plain(inputs).square().mean().backward()
    for ours, theirs in zip(layers.parameters(), plain.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.98


def test_float8_needs_the_device(run_training: Any) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="does not multiply in float8"):
        run_training(tuner_type="full", fp8=True)
