"""What TRL's sides of the measurements share: arguments, settings, the adapter, and marks after each step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import write_mark
from settings import BATCH_SIZE, LORA_ALPHA, LORA_RANK

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH_SIZE,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""What every side tells TRL's configuration."""


def side_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="-1: one pass over the data")
    return parser


def read_rows(arguments: argparse.Namespace) -> Any:
    from datasets import load_dataset

    cache = str(arguments.out / "cache")
    return load_dataset("json", data_files=arguments.data, split="train", cache_dir=cache)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def train(trainer: Any, out: Path) -> None:
    """Train; ``out/marks.jsonl`` has a line after each optimizer step, ``out/lines.json`` what TRL logged.

    Tokens are counted in the collated batches, where there are any: everything that is not padding.
    """
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokens_of_batch: list[int] = []
    collate = trainer.data_collator

    def counting_collate(examples: list[dict[str, Any]]) -> Any:
        batch = collate(examples)
        if "attention_mask" in batch:
            tokens_of_batch.append(int(batch["attention_mask"].sum()))
        return batch

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write_mark(out, state.global_step, sum(tokens_of_batch[: state.global_step]))

    trainer.data_collator = counting_collate
    trainer.add_callback(Marks())
    trainer.train()
    (out / "lines.json").write_text(json.dumps(trainer.state.log_history))
