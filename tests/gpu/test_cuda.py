"""Checks on a CUDA device: the same losses as on the CPU, isolation by the device's kernels, resume, memory figures.

Run by hand where a device is at hand: ``pytest tests/gpu -m gpu``.
"""

import pytest
import torch
from tests.train.conftest import chat_file, run_training

from swift.runs.metrics import read_metrics

__all__ = ["chat_file", "run_training"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(result):
    return [row["loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": True}])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_float32_losses_equal_the_cpu(run_training, layout, tuner):
    options = {"torch_dtype": "float32", "tuner_type": tuner, "max_steps": 6, "learning_rate": 1e-3, **layout}
    cpu = run_training(device="cpu", run_name="cpu", **options)
    cuda = run_training(device="cuda", run_name="cuda", **options)
    assert losses(cuda) == pytest.approx(losses(cpu), rel=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_half_precision_packed_learns(run_training, dtype, tuner):
    result = run_training(
        device="cuda", torch_dtype=dtype, tuner_type=tuner, packing=True, num_train_epochs=8,
        learning_rate=1e-2 if tuner == "lora" else 2e-3,
    )  # fmt: skip
    assert result.summary["last_loss"] < result.summary["first_loss"] - 0.3
    memory = [row["gpu_mem_usage"] for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]
    assert all(value > 0 for value in memory)


def test_resume_continues_with_the_same_losses(run_training):
    options = {"device": "cuda", "save_steps": 4, "lora_dropout": 0.1, "lr_scheduler_type": "constant"}
    whole = run_training(run_name="whole", max_steps=8, **options)
    run_training(run_name="cut", max_steps=4, **options)
    cut = run_training(run_name="cut", max_steps=8, resume_from_checkpoint="last", **options)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
