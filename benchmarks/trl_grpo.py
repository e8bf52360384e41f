"""TRL's side of ``grpo_vs_trl.py``: ``python trl_grpo.py MODEL DATA OUT --steps N``; writes ``OUT/marks.jsonl``."""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

from grpo_reward import vowels


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = GRPOConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_completion_length=48,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
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

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            mark = {"step": state.global_step, "cpu_seconds": cpu_seconds(), "num_tokens": 0}
            with (arguments.out / "marks.jsonl").open("a") as file:
                file.write(json.dumps(mark) + "\n")

    rows = load_dataset(
        "json", data_files=arguments.data, split="train", cache_dir=str(arguments.out / "cache")
    )
    trainer = GRPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=rows.map(lambda row: {"prompt": row["messages"]}, remove_columns=rows.column_names),
        reward_funcs=vowels,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Marks()],
    )
    trainer.train()
    lines = [
        {"reward": line["reward"], "length": line["completions/mean_length"]}
        for line in trainer.state.log_history
        if "reward" in line
    ]
    (arguments.out / "lines.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
