"""LoftQ against rounding and decomposition by numpy; a run that learns, resumes, reloads and merges what it trained."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tests.resuming import train_and_resume
from tests.train.conftest import chat_file, run_training

from swift.cli.merge_lora import merge
from swift.config.bind import resolve
from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.inference.context import find_context, load_context
from swift.models.load import load_model
from swift.models.quantised import dequantised, stored_weights
from swift.models.tiny import make_tiny_model
from swift.runs.metrics import read_metrics
from swift.tuners.apply import DEFAULT_ADAPTER, apply_tuner
from swift.tuners.lora import lora_layers
from swift.tuners.peft_format import load_adapter
from swift.tuners.starts import start_from_rounding

__all__ = ["chat_file", "run_training"]  # fixtures

NF4 = QuantizationSection(quant_method="bnb", quant_bits=4, bnb_4bit_use_double_quant=False)
INT8 = QuantizationSection(quant_method="bnb", quant_bits=8)
TOKENS = torch.arange(3, 19)[None]
RANK, ALPHA = 3, 12
QUANTILES = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0,
             0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]  # fmt: skip
"""The values of NF4 (arXiv 2305.14314, appendix E), to five digits."""


def rounded(weight: np.ndarray, bits: int) -> np.ndarray:
    """NF4: the nearest of 16 values of the largest number of each 64. int8: 127 steps of the largest of each row."""
    if bits == 8:
        weight = weight.astype(np.float16).astype(np.float64)  # as bitsandbytes takes it
        largest = np.abs(weight).max(1, keepdims=True)
        return np.round(weight / largest * 127) * largest / 127
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    values = np.array(QUANTILES)
    nearest = np.abs((blocks / largest)[..., None] - values).argmin(-1)
    return (values[nearest] * largest).reshape(weight.shape)


@pytest.mark.parametrize(("section", "bits"), [(NF4, 4), (INT8, 8)], ids=["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_the_start_by_numpy(section, bits, architecture, tiny_model_dir, tmp_path) -> None:
    folder = tiny_model_dir
    if architecture == "gpt2":  # its layers hold [in, out], and are turned round when they are quantised
        folder = make_tiny_model(tmp_path / "gpt2", architecture="gpt2", hidden_size=64)
    exact = load_model(folder, dtype=torch.float32)
    model = load_model(folder, dtype=torch.float32, quantization=section)
    apply_tuner(model, TunerSection(lora_rank=RANK, lora_alpha=ALPHA, init_weights="loftq"))
    start_from_rounding(model, DEFAULT_ADAPTER, stored_weights(folder))
    layers = lora_layers(model)
    assert len(layers) == (14 if architecture == "qwen3" else 8)
    for key, layer in layers.items():
        weight = exact.get_submodule(key).weight.detach().double().numpy()
        weight = weight.T if architecture == "gpt2" else weight
        matrix = rounded(weight, bits)
        others = np.abs(matrix - dequantised(layer.base).numpy()) > 1e-5  # halfway between two values
        assert others.mean() < 2e-3
        update = layer.delta(DEFAULT_ADAPTER).numpy()
        singular = np.linalg.svd(weight - matrix, compute_uv=False)
        # no matrix of this rank comes nearer (Eckart and Young), and only one comes as near
        assert np.linalg.matrix_rank(update) == RANK
        np.testing.assert_allclose(
            np.linalg.norm(weight - matrix - update), np.linalg.norm(singular[RANK:]), rtol=1e-3
        )
        a, b = layer.lora_A[DEFAULT_ADAPTER].detach(), layer.lora_B[DEFAULT_ADAPTER].detach()
        np.testing.assert_allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_trains_resumes_reloads_and_merges(bits, run_training, tiny_model_dir, tmp_path) -> None:
    options = {"quant_bits": bits, "init_weights": "loftq", "lora_rank": 4, "lora_dropout": 0.1}
    whole = train_and_resume(run_training, tmp_path, **options)

    words = ["--adapters", str(whole), "--device", "cpu"]
    infer = resolve("infer", words)
    trained = load_context(find_context(infer), infer).model
    merged = load_model(merge(resolve("merge-lora", [*words, "--output_dir", str(tmp_path / "merged")])),
                        dtype=torch.float32)  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    # 8-bit layers round their inputs as well when they evaluate; 4-bit ones compute with the values that are merged
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5 if bits == 4 else 2e-2, rtol=1e-4)

    with pytest.raises(ModelError, match="not quantised"):
        load_adapter(load_model(tiny_model_dir, dtype=torch.float32), whole / "last")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(whole / "last" / name, alone / name)
    with pytest.raises(ModelError, match="of its run, which is not here"):
        find_context(resolve("merge-lora", ["--adapters", str(alone)]))


def test_peft_loads_it_onto_the_same_base(run_training, tiny_model_dir) -> None:
    from peft import PeftModel

    options = {"quant_bits": 4, "init_weights": "loftq", "lora_rank": 4, "max_steps": 2}
    folder = run_training(**options).folder / "last"
    ours, theirs = (load_model(tiny_model_dir, dtype=torch.float32, quantization=QuantizationSection(
        quant_method="bnb", quant_bits=4)) for _ in range(2))  # fmt: skip
    load_adapter(ours, folder)
    with pytest.warns(UserWarning, match="loftq_config"):
        theirs = PeftModel.from_pretrained(theirs, folder)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_refused_without_a_base_that_is_quantised() -> None:
    words = ["--model", "m", "--dataset", "d", "--init_weights", "loftq"]
    with pytest.raises(ConfigError, match="bitsandbytes quantises"):
        resolve("sft", words)
    assert (
        resolve("sft", [*words, "--quant_bits", "4", "--loftq_iter", "1"]).config.tuner.init_weights
        == "loftq"
    )
    with pytest.raises(ConfigError, match="second round"):
        resolve("sft", [*words, "--quant_bits", "4", "--loftq_iter", "5"])
