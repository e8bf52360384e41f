"""Folders whose weights are quantised already, as frozen bases: those that load on a CPU, and those that do not."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.resuming import train_and_resume

from swift.cli.merge_lora import merge
from swift.config.bind import resolve
from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError, ModelError
from swift.models.facts import ModelFacts
from swift.models.load import load_model
from swift.models.quantised import check_loadable, prepare_stored
from swift.plan.plan import make_plan
from swift.plan.quantised import frozen_bytes
from swift.tuners.peft_format import load_adapter

NF4 = QuantizationSection(quant_method="bnb", quant_bits=4)
INT8 = QuantizationSection(quant_method="bnb", quant_bits=8)
TOKENS = torch.arange(3, 19)[None]
BLOCK = 32


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def fp8_folders(base, folder, **settings):
    """A folder in DeepSeek's FP8 (one scale for each block), and one of the values that this stands for."""
    packed, plain = folder / "fp8", folder / "plain"
    shutil.copytree(base, packed)
    shutil.copytree(base, plain)
    tensors, values = load_file(base / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        values[name] = weight
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448  # the largest number of this format
            tensors[name] = (blocks / scale).to(torch.float8_e4m3fn).reshape(rows, columns)
            tensors[name.replace("weight", "weight_scale_inv")] = scale[:, 0, :, 0]
            numbers = tensors[name].float().reshape(blocks.shape) * scale
            values[name] = numbers.reshape(rows, columns).to(weight.dtype)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    change_config(packed, quantization_config={**method, **settings})
    return packed, plain


def test_fp8_is_unpacked_where_its_config_says_so(run_training, tiny_model_dir, tmp_path):
    packed, plain = fp8_folders(tiny_model_dir, tmp_path, dequantize=True)
    model = load_model(packed, dtype=torch.float32)
    torch.testing.assert_close(
        logits(model), logits(load_model(plain, dtype=torch.float32)), rtol=1e-5, atol=1e-5
    )
    assert (logits(model) - logits(load_model(tiny_model_dir, dtype=torch.float32))).abs().max() > 1e-3
    run = train_and_resume(run_training, tmp_path, model=str(packed), lora_dropout=0.1)
    load_adapter(model, run / "last")
    words = ["--adapters", str(run), "--output_dir", str(tmp_path / "merged"), "--device", "cpu"]
    merged = load_model(merge(resolve("merge-lora", words)), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_full_training_stores_what_was_unpacked(run_training, tiny_model_dir, tmp_path):
    packed, plain = fp8_folders(tiny_model_dir, tmp_path, dequantize=True)
    run = run_training(model=str(packed), tuner_type="full", learning_rate=1e-6, max_steps=1)
    stored = load_model(run.folder / "last", dtype=torch.float32)
    torch.testing.assert_close(
        logits(stored), logits(load_model(plain, dtype=torch.float32)), rtol=1e-3, atol=1e-3
    )


def test_fp8_needs_cuda_otherwise(run_training, tiny_model_dir, tmp_path):
    packed, _ = fp8_folders(tiny_model_dir, tmp_path)
    with pytest.raises(ModelError, match="CUDA") as refused:
        run_training(model=str(packed), device="cpu")
    assert '"dequantize": true' in refused.value.fix


@pytest.mark.parametrize("section", [NF4, INT8], ids=["nf4", "int8"])
def test_a_folder_of_bitsandbytes(section, run_training, tiny_model_dir, tmp_path):
    """It computes what the base quantised while loading computes, and is merged into no 4-bit weights either."""
    folder = tmp_path / "stored"
    shutil.copytree(tiny_model_dir, folder)
    quantised = load_model(tiny_model_dir, dtype=torch.float32, quantization=section)
    quantised.save_pretrained(folder)
    stored = load_model(folder, dtype=torch.float32)
    assert torch.equal(logits(stored), logits(quantised))
    run = train_and_resume(run_training, tmp_path, model=str(folder), lora_dropout=0.1)
    load_adapter(stored, run / "last")
    load_adapter(quantised, run / "last")
    assert torch.equal(logits(stored), logits(quantised))
    words = ["--adapters", str(run), "--output_dir", str(tmp_path / "merged"), "--device", "cpu"]
    with pytest.raises(ModelError, match="quantised") as refused:
        merge(resolve("merge-lora", words))
    assert "--model FULL_PRECISION_FOLDER" in refused.value.fix
    merged = load_model(
        merge(resolve("merge-lora", [*words, "--model", str(tiny_model_dir)])), dtype=torch.float32
    )
    full = load_model(tiny_model_dir, dtype=torch.float32)
    load_adapter(full, run / "last")
    torch.testing.assert_close(logits(merged), logits(full), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "optimum"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "compressed_tensors"),
        ("torchao", "torchao"),
        ("hqq", "hqq"),
        ("quanto", "optimum"),
        ("bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(
    method, package, tiny_model_dir, tmp_path, monkeypatch
):
    folder = tmp_path / method
    shutil.copytree(tiny_model_dir, folder)
    change_config(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 64})
    (folder / "model.safetensors").write_bytes(b"not read")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=f"{package} is not installed") as missing:
        check_loadable(config, "cpu", QuantizationSection(), str(folder))
    assert missing.value.fix.startswith("pip install")


def test_what_cannot_be_quantised_again_or_is_unknown():
    with pytest.raises(ConfigError, match="quantised already"):
        check_loadable({"quantization_config": {"quant_method": "fp8"}}, "cuda", NF4, "m")
    with pytest.raises(ModelError, match="cannot be loaded"):
        check_loadable({"quantization_config": {"quant_method": "new"}}, "cuda", QuantizationSection(), "m")


@pytest.mark.parametrize("tuner", ["full", "llamapro"])
def test_it_is_not_trained_in_full(tuner, run_training, tiny_model_dir, tmp_path):
    folder = tmp_path / "stored"
    shutil.copytree(tiny_model_dir, folder)
    load_model(tiny_model_dir, dtype=torch.float32, quantization=NF4).save_pretrained(folder)
    with pytest.raises(ConfigError, match="in full"):
        run_training(model=str(folder), tuner_type=tuner, max_steps=1)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_kernels_that_pass_gradients_are_asked_for(method):
    """gptqmodel's fastest kernels raise in training; what transformers hands on is what counts."""
    from transformers import AwqConfig, GPTQConfig, PretrainedConfig

    settings = {"quant_method": method, "bits": 4, "group_size": 64}
    config = PretrainedConfig(quantization_config=dict(settings))
    prepare_stored(config)
    kind = {"gptq": GPTQConfig, "awq": AwqConfig}[method]
    assert kind.from_dict(settings).backend != "auto_trainable"
    assert kind.from_dict(config.quantization_config).backend == "auto_trainable"


def test_the_plan_counts_unpacked_weights_in_full(tiny_model_dir, tmp_path):
    packed, _ = fp8_folders(tiny_model_dir, tmp_path)
    on_disk = ModelFacts.read(packed)
    assert frozen_bytes(on_disk, [], QuantizationSection(), 4) == on_disk.weights_bytes
    change_config(packed, quantization_config={"quant_method": "fp8", "dequantize": True})
    values = {"model": str(packed), "dataset": "d", "torch_dtype": "float32", "device": "cpu"}
    plan = make_plan(resolve("sft", values=values, planning=True))
    parameters = sum(one.numel() for one in load_model(tiny_model_dir, dtype=torch.float32).parameters())
    assert plan.memory["parts"]["weights"] == 4 * parameters
