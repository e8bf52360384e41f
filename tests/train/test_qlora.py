"""QLoRA runs on CPU: learning, resuming, merging into the full-precision base; quantised folders that are refused."""

from __future__ import annotations

import json

import pytest
import torch

from swift.config.bind import resolve
from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError
from swift.models.quantised import check_packages
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback

NF4 = {"quant_method": "bnb", "quant_bits": 4}
TIMING = ("tokens_per_second", "step_time", "cpu_seconds", "eval_seconds")


class Killed(BaseException):
    pass


class Kill(Callback):
    def on_step_end(self, run):
        if run.state.step == 4:
            raise Killed


def losses(folder):
    return [
        {k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder / "metrics.jsonl")
    ]


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "last" / "adapter_model.safetensors")


CASES = {
    "nf4, paged 8-bit optimizer": {**NF4, "optim": "paged_adamw_8bit", "lora_dropout": 0.1},
    "packed, recomputing, evaluating": {
        **NF4,
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "split_dataset_ratio": 0.2,
        "eval_steps": 3,
        "torch_dtype": "bfloat16",
    },
    "int8, schedule-free": {"quant_method": "bnb", "quant_bits": 8, "optim": "schedule_free_adamw"},
}


@pytest.mark.parametrize("name", CASES)
def test_learns_and_resumes_exactly(run_training, name):
    options = {"save_steps": 3, "max_steps": 6, "num_train_epochs": 9, **CASES[name]}
    whole = run_training(run_name="whole", **options)
    with pytest.raises(Killed):
        run_training(callbacks=[Kill()], run_name="cut", **options)
    cut = run_training(run_name="cut", resume_from_checkpoint="last", **options)
    assert losses(cut.folder) == losses(whole.folder)
    mine, other = adapter(cut.folder), adapter(whole.folder)
    assert all(torch.equal(mine[key], other[key]) for key in other)
    assert whole.summary["last_loss"] < whole.summary["first_loss"]


def test_merging_takes_the_full_precision_base(run_training, tmp_path):
    """Merged logits are those of the adapter on the unquantised base, to 1e-5 in float32."""
    from swift.cli.merge_lora import merge
    from swift.inference.context import find_context, load_context
    from swift.models.load import load_model

    run = run_training(max_steps=3, **NF4)
    words = ["--adapters", str(run.folder), "--device", "cpu"]
    folder = merge(resolve("merge-lora", [*words, "--output_dir", str(tmp_path / "merged")]))
    infer = resolve("infer", words)
    context = find_context(infer)
    assert context.quantization.quant_bits == 4  # inference goes on as the run was trained
    ids = torch.arange(20)[None]
    merged = load_model(folder, dtype=torch.float32)
    context.quantization = QuantizationSection()
    full = load_context(context, infer).model
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - full(input_ids=ids).logits).abs().max()
    assert difference <= 1e-5
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_command_line_spellings():
    def quantization(*words):
        resolved = resolve("sft", ["--model", "m", "--dataset", "d", *words])
        section = resolved.config.quantization
        return section.quant_method, section.quant_bits

    assert quantization() == (None, None)
    assert quantization("--quantization_bit", "4") == ("bnb", 4)
    assert quantization("--quant_method", "bnb") == ("bnb", 4)
    assert quantization("--load_in_8bit", "true") == ("bnb", 8)
    assert quantization("--quant_method", "torchao") == ("torchao", 8)
    assert quantization("--quant_bits", "16")[0] is None
    with pytest.raises(ConfigError, match="in full"):
        quantization("--quant_bits", "4", "--tuner_type", "full")
    with pytest.raises(ConfigError, match="stores 4 or 8 bits, not 5"):
        quantization("--quant_method", "bnb", "--quant_bits", "5")
    with pytest.raises(ConfigError, match="full"):
        quantization("--use_galore", "true")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import swift.models.quantised as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_packages(QuantizationSection(**NF4))
    assert caught.value.fix == "pip install 'swift-forge[bnb]'"
