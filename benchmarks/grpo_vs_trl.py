"""Group relative policy optimisation beside TRL: same model, prompts, reward and settings, in turn, one thread.

    python benchmarks/grpo_vs_trl.py [--rounds 3] [--steps 20]

LoRA rank 8 on all linear layers, 8 answers of at most 48 tokens to one prompt a step, temperature 1, no reference.
CPU-seconds a step: user + system time between the end of step 5 and the last step, of the training process
(the process in which our rewards run uses a few milliseconds more). The answers differ, and so do their lengths, which
are told.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from beside_trl import Run, in_turn
from make_work import make_work
from measure import HERE, described_parser, markdown_table, median, write_results

OPTIONS = {
    "rlhf_type": "grpo",
    "reward_funcs": f"{HERE / 'grpo_reward.py'}:vowels",
    "reward_num_proc": 1,
    "beta": 0,
    "num_generations": 8,
    "max_completion_length": 48,
}


def mean_length(run: Run) -> float:
    return statistics.fmean(run.logged("completions/mean_length"))


def report(runs: dict[str, list[Run]], steps: int) -> None:
    values: dict[str, Any] = {}
    rows = []
    for name, mine in runs.items():
        seconds = [run.step_seconds for run in mine]
        shares = [one / other.step_seconds for one, other in zip(seconds, runs["TRL"], strict=True)]
        lengths = [mean_length(run) for run in mine]
        values[name] = {
            "step_cpu_seconds": seconds,
            "share_of_trl": shares,
            "mean_length": lengths,
            "cpu_seconds_of_the_process": [run.child.cpu_seconds for run in mine],
            "rewards": [run.logged("reward") for run in mine],
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
    parser = described_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        runs = in_turn(
            "trl_grpo.py",
            OPTIONS,
            model,
            data / "grpo.jsonl",
            folder / "runs",
            rounds=arguments.rounds,
            steps=arguments.steps,
            tell=lambda run: f"{run.step_seconds:.3f} CPU-s a step, {mean_length(run):.1f} tokens",
        )
        report(runs, arguments.steps)


if __name__ == "__main__":
    main()
