"""The one setting of the training measurements, and how our side is started with it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LORA_RANK = 8
LORA_ALPHA = 16
LEARNING_RATE = 2e-3
RLHF_LEARNING_RATE = 1e-4
BATCH_SIZE = 8
MAX_LENGTH = 512
SEED = 42


@dataclasses.dataclass(frozen=True)
class SwiftRow:
    """One way to run our side.

    Attributes:
        name: name of the row.
        bare_mode: the batches of ``bare_loop.py`` that are the same.
        dtype: compute precision.
        flags: what is added to the common flags.
    """

    name: str
    bare_mode: str
    dtype: str
    flags: tuple[str, ...]


SWIFT_ROWS = (
    SwiftRow("default", "joined", "float32", ()),
    SwiftRow("packed", "packed", "float32", ("--packing",)),
    SwiftRow("packed-bf16", "packed", "bfloat16", ("--packing", "--torch_dtype", "bfloat16")),
)


def swift_words(command: str, model: Path, data: Path, out: Path, steps: int, **options: Any) -> list[str]:
    """The command line of one run in the run folder ``out``; it writes ``out/marks.jsonl``.

    Args:
        data: the training file.
        steps: optimizer steps; -1 for one pass over the data.
        options: added to the settings, or in place of them.
    """
    settings = {
        "model": model,
        "dataset": data,
        "output_dir": out.parent,
        "run_name": out.name,
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_length": MAX_LENGTH,
        "max_steps": steps,
        "load_from_cache_file": "false",  # TRL starts without cached tokens as well
        "save_strategy": "no",
        "callbacks": Path(__file__).with_name("record_marks.py"),
        **options,
    }
    return [sys.executable, "-m", "swift.cli.main", command, *option_words(settings)]


def option_words(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def swift_command(
    row: SwiftRow,
    model: Path,
    data: Path,
    out: Path,
    steps: int,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
) -> list[str]:
    """As `swift_words`, for one `swift sft` run."""
    options = {
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "seed": seed,
        "logging_steps": 10,
    }
    return [*swift_words("sft", model, data, out, steps, **options), *row.flags]
