"""The one setting of the SFT measurements, and how our side is started with it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

LORA_RANK = 8
LORA_ALPHA = 16
LEARNING_RATE = 2e-3
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
    """The command line of one `swift sft` run in the run folder ``out``; it writes ``out/marks.jsonl``.

    Args:
        data: the training file.
        steps: optimizer steps; -1 for one pass over the data.
    """
    options = {
        "--model": model,
        "--dataset": data,
        "--output_dir": out.parent,
        "--run_name": out.name,
        "--lora_rank": LORA_RANK,
        "--lora_alpha": LORA_ALPHA,
        "--lora_dropout": 0,
        "--learning_rate": LEARNING_RATE,
        "--lr_scheduler_type": "constant",
        "--weight_decay": 0,
        "--adam_beta2": 0.999,
        "--per_device_train_batch_size": batch_size,
        "--gradient_accumulation_steps": 1,
        "--max_length": MAX_LENGTH,
        "--max_steps": steps,
        "--num_train_epochs": 1,
        "--seed": seed,
        "--logging_steps": 10,
        "--load_from_cache_file": "false",  # TRL starts without cached tokens as well
        "--save_strategy": "no",
        "--callbacks": Path(__file__).with_name("record_marks.py"),
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    return [sys.executable, "-m", "swift.cli.main", "sft", *words, *row.flags]
