"""The second part of the demo: a second task for the trained model, as four LoRA experiments at once."""

from __future__ import annotations

from pathlib import Path

import yaml

from swift.core.files import atomic_write_text
from swift.demo.run import BATCH_SIZE, NUM_HELDOUT
from swift.demo.task import write_task

__all__ = ["LEARNING_RATES", "write_experiments"]

LEARNING_RATES = {"careful": 3e-4, "steady": 1e-3, "bold": 1e-2, "reckless": 0.3}
"""Experiment -> learning rate. The question that the report answers: which of them learns the task?"""

NUM_STEPS = 120


def write_experiments(folder: Path, model: Path, *, seed: int) -> Path:
    """Write the second task's data and ``experiments.yaml`` into ``folder``; returns the latter's path.

    Args:
        model: what `run_demo` has trained. The experiments train adapters for it.
        seed: of data and training.
    """
    train, heldout = write_task(
        folder, num_train=NUM_STEPS * BATCH_SIZE, num_heldout=NUM_HELDOUT, seed=seed, verb="Rotate"
    )
    defaults = {
        "command": "sft",
        "model": str(model),
        "device": "cpu",
        "dataset": str(train),
        "val_dataset": str(heldout),
        "max_length": 64,
        "tuner_type": "lora",
        "lora_rank": 16,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 10,
        "save_steps": NUM_STEPS,
        "logging_steps": 4,
        "seed": seed,
        "output_dir": str(folder / "experiments"),
    }
    content = {
        "name": "which-learning-rate",
        "defaults": defaults,
        "experiments": {name: {"learning_rate": rate} for name, rate in LEARNING_RATES.items()},
        "after": {"evaluate": {"max_new_tokens": 8, "max_num_seqs": 100}},
    }
    path = folder / "experiments.yaml"
    atomic_write_text(path, yaml.safe_dump(content, sort_keys=False))
    return path
