"""TRL's side of ``dpo_vs_trl.py``: ``python trl_dpo.py MODEL DATA OUT --steps N``.

Writes ``OUT/marks.jsonl`` (one line after each optimizer step; tokens are those that are not padding) and
``OUT/losses.json``. ``--imports`` only imports what training imports, to tell its memory apart.
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
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--imports", action="store_true")
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = DPOConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=512,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=42,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    if arguments.imports:
        return
    tokens_of_batch: list[int] = []

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            mark = {"step": step, "cpu_seconds": cpu_seconds(), "num_tokens": sum(tokens_of_batch[:step])}
            with (arguments.out / "marks.jsonl").open("a") as file:
                file.write(json.dumps(mark) + "\n")

    def as_trl(row: dict[str, Any]) -> dict[str, Any]:
        *prompt, answer = row["messages"]
        return {
            "prompt": prompt,
            "chosen": [answer],
            "rejected": [{"role": "assistant", "content": row["rejected_response"]}],
        }

    rows = load_dataset(
        "json", data_files=arguments.data, split="train", cache_dir=str(arguments.out / "cache")
    )
    trainer = DPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=rows.map(as_trl, remove_columns=rows.column_names),
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
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    (arguments.out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
