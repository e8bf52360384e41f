"""The second part of the demo: the same task as four experiments at once."""

from __future__ import annotations

from pathlib import Path

import yaml

from swift.core.files import atomic_write_text
from swift.demo.run import BATCH_SIZE

__all__ = ["LEARNING_RATES", "write_experiments"]

LEARNING_RATES = {"careful": 3e-4, "steady": 1e-3, "bold": 3e-3, "reckless": 3e-2}
"""Experiment -> learning rate. The question that the report answers: which of them learns the task?"""

NUM_STEPS = 120


def write_experiments(folder: Path, *, seed: int) -> Path:
    """Write ``experiments.yaml`` for the model and data that `run_demo` left in ``folder``; returns its path."""
    defaults = {
        "command": "sft",
        "model": str(folder / "model"),
        "device": "cpu",
        "dataset": str(folder / "train.jsonl"),
        "val_dataset": str(folder / "heldout.jsonl"),
        "max_length": 64,
        "tuner_type": "full",
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
