"""TRL's side of a measurement: ``python trl_sft.py MODEL DATA OUT --steps N``.

The settings are those of ``sft_vs_trl.py``. Writes ``OUT/marks.jsonl`` (one line after each optimizer step) and the
adapter in ``OUT/adapter``. Tokens are counted in the collated batches: everything that is not padding.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="-1: one pass over the data")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens_of_batch: list[int] = []

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            mark = {"step": step, "cpu_seconds": cpu_seconds(), "num_tokens": sum(tokens_of_batch[:step])}
            with (arguments.out / "marks.jsonl").open("a") as file:
                file.write(json.dumps(mark) + "\n")

    config = SFTConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_length=512,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=arguments.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=arguments.model,
        args=config,
        train_dataset=load_dataset(
            "json", data_files=arguments.data, split="train", cache_dir=str(arguments.out / "cache")
        ),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Marks()],
    )
    collate = trainer.data_collator

    def counting_collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        tokens_of_batch.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting_collate
    trainer.train()
    trainer.save_model(str(arguments.out / "adapter"))


if __name__ == "__main__":
    main()
