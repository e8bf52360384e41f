"""Group relative policy optimisation beside TRL: same model, prompts, reward and settings, in turn, one thread.

    python benchmarks/grpo_vs_trl.py [--rounds 3] [--steps 20]

LoRA rank 8 on all linear layers, 8 answers of at most 48 tokens to one prompt a step, temperature 1, no reference.
CPU-seconds a step: user + system time between the end of step 5 and the last step, of the training process
(the process in which our rewards run uses a few milliseconds more). The answers differ, and so do their lengths, which
are told.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_work import make_work
from measure import HERE, Child, Mark, markdown_table, median, read_marks, run_child, write_results

WARM_UP_STEPS = 5
SOURCE = {"PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured process; ``lines``: reward and mean length of each step."""

    child: Child
    marks: list[Mark]
    lines: list[dict[str, float]]

    @property
    def step_seconds(self) -> float:
        """Of the process between the marks."""
        first = next(mark for mark in self.marks if mark.step == WARM_UP_STEPS)
        return (self.marks[-1].cpu_seconds - first.cpu_seconds) / (self.marks[-1].step - first.step)

    @property
    def length(self) -> float:
        return sum(line["length"] for line in self.lines) / len(self.lines)


def run_trl(model: Path, data: Path, out: Path, steps: int) -> Run:
    words = [
        sys.executable,
        str(HERE / "trl_grpo.py"),
        str(model),
        str(data),
        str(out),
        "--steps",
        str(steps),
    ]
    child = run_child(words, out.with_suffix(".log"))
    return Run(child, read_marks(out / "marks.jsonl"), json.loads((out / "lines.json").read_text()))


def run_swift(model: Path, data: Path, out: Path, steps: int) -> Run:
    options = {
        "--rlhf_type": "grpo",
        "--model": model,
        "--dataset": data,
        "--output_dir": out.parent,
        "--run_name": out.name,
        "--reward_funcs": f"{HERE / 'grpo_reward.py'}:vowels",
        "--reward_num_proc": 1,
        "--lora_rank": 8,
        "--lora_alpha": 16,
        "--learning_rate": 1e-4,
        "--lr_scheduler_type": "constant",
        "--weight_decay": 0,
        "--adam_beta2": 0.999,
        "--beta": 0,
        "--num_generations": 8,
        "--max_completion_length": 48,
        "--per_device_train_batch_size": 8,
        "--gradient_accumulation_steps": 1,
        "--max_length": 512,
        "--max_steps": steps,
        "--logging_steps": 1,
        "--load_from_cache_file": "false",
        "--save_strategy": "no",
        "--callbacks": HERE / "record_marks.py",
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    child = run_child(
        [sys.executable, "-m", "swift.cli.main", "rlhf", *words], out.with_suffix(".log"), SOURCE
    )
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [
        {
            "reward": line["reward"],
            "length": line["completions/mean_length"],
            "sample": line["seconds/sample"],
        }
        for line in found
        if "reward" in line
    ]
    return Run(child, read_marks(out / "marks.jsonl"), lines)


SIDES = {"TRL": run_trl, "swift": run_swift}


def report(runs: dict[str, list[Run]], steps: int) -> None:
    values: dict[str, Any] = {}
    rows = []
    for name, mine in runs.items():
        seconds = [run.step_seconds for run in mine]
        shares = [one / other.step_seconds for one, other in zip(seconds, runs["TRL"], strict=True)]
        lengths = [run.length for run in mine]
        values[name] = {
            "step_cpu_seconds": seconds,
            "share_of_trl": shares,
            "mean_length": lengths,
            "cpu_seconds_of_the_process": [run.child.cpu_seconds for run in mine],
            "rewards": [[line["reward"] for line in run.lines] for run in mine],
        }
        rows.append([name, f"{median(seconds):.3f}", f"{median(shares):.2f}", f"{median(lengths):.1f}"])
    text = (
        "# Group relative policy optimisation beside TRL\n\n"
        "Qwen3 with 6.8M random parameters, LoRA rank 8 on all linear layers, 8 answers of at most 48 tokens a step,\n"
        f"float32, one thread, {steps} steps, {len(runs['TRL'])} rounds in turn.\n\n"
    )
    table = markdown_table(["run", "CPU-seconds a step", "of TRL", "tokens of an answer"], rows)
    write_results("grpo_vs_trl", text + table, values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        for number in range(arguments.rounds):
            for name, run_side in SIDES.items():
                run = run_side(model, data / "grpo.jsonl", folder / f"{name}-{number}", arguments.steps)
                runs[name].append(run)
                print(
                    f"round {number + 1}: {name}: {run.step_seconds:.3f} CPU-s a step, {run.length:.1f} tokens",
                    flush=True,
                )
        report(runs, arguments.steps)


if __name__ == "__main__":
    main()
