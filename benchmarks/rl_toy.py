"""Policy optimisation on a toy: reverse five digits, with every main algorithm and several seeds, on CPU.

    python benchmarks/rl_toy.py [--algorithms grpo dapo] [--seeds 0 1 2] [--steps 150]

A Qwen3 with 93,000 parameters is fine-tuned until the loss of a batch is below 0.7 nats a token, some 40 steps, after
which it answers a few questions; then at most 150 steps of 16 prompts with 8 answers each, rewarded with the share of
right digits, without a reference. Every ten steps 200 other questions are answered greedily; a run ends when 95 % of
the answers are right.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from measure import described_parser, markdown_table, median, write_results

ALGORITHMS = ("grpo", "dapo", "dr_grpo", "rloo", "cispo", "sapo", "gspo", "reinforce_pp_baseline")
GOAL = 0.95
WARM_UP_STEPS, WARM_UP_LOSS = 100, 0.7
EVERY = 10
# Small rotary base and larger initial weights: so small a model needs them to tell places apart (see swift.demo.run).
MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_layers": 2,
    "max_position_embeddings": 64,
    "config": {"initializer_range": 0.06, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}
COMMON: dict[str, Any] = {
    "device": "cpu",
    "tuner_type": "full",
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "weight_decay": 0,
    "max_length": 32,
    "num_threads": 1,
    "save_only_model": True,
    "save_steps": 100_000,
}
REWARD = '''def right(completions, answer, **kwargs):
    """1 where the whole answer is right."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]
'''


def warm_up(folder: Path, seed: int) -> Path:
    """The model that all algorithms of a seed begin with."""
    from swift.config.bind import resolve
    from swift.models.tiny import make_tiny_model
    from swift.train.callbacks.base import Callback, RunView
    from swift.train.run import train

    class Enough(Callback):
        """What is learned in a few more steps would leave nothing to policy optimisation."""

        def on_log(self, run: RunView, metrics: dict[str, Any]) -> None:
            if metrics["loss"] < WARM_UP_LOSS:
                run.stop("warm enough")

    model = make_tiny_model(
        folder / f"model-{seed}", texts=("user", "assistant", "Reverse"), seed=seed, **MODEL
    )
    values = {
        **COMMON,
        "model": str(model),
        "dataset": f"task:reverse:seed={seed + 1}#{WARM_UP_STEPS * 64}",
        "max_steps": WARM_UP_STEPS,
        "per_device_train_batch_size": 64,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "seed": seed,
        "output_dir": str(folder / "warm-up"),
    }
    run = train(resolve("sft", values=values), callbacks=[Enough()], say=lambda text: None)
    return run.folder / "last"


def learn(folder: Path, model: Path, algorithm: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: right answers at each evaluation, until the goal or the end."""
    from swift.config.bind import resolve
    from swift.rl.run import train
    from swift.train.callbacks.base import Callback, RunView

    reward = folder / "reward.py"
    reward.write_text(REWARD)
    curve: dict[int, float] = {}

    class Goal(Callback):
        def on_evaluate(self, run: RunView, metrics: dict[str, Any]) -> None:
            curve[run.state.step] = metrics["eval_rewards/right"]
            if curve[run.state.step] >= GOAL:
                run.stop("the goal is reached")

    values = {
        **COMMON,
        "rlhf_type": algorithm,
        "model": str(model),
        "dataset": f"task:reverse:seed={100 + seed}#4000",
        "val_dataset": "task:reverse:seed=999#200",
        "reward_funcs": ["task", f"{reward}:right"],
        "reward_weights": [1.0, 0.0],
        "max_steps": steps,
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "beta": 0,
        "eval_steps": EVERY,
        "seed": seed,
        "save_rollouts": False,
        "output_dir": str(folder / algorithm),
    }
    started = time.process_time()
    train(resolve("rlhf", values=values), callbacks=[Goal()], say=lambda text: None)
    return {"curve": curve, "cpu_seconds": time.process_time() - started}


def start_of(folder: Path, model: Path) -> float:
    """Share of right answers before policy optimisation."""
    from swift.config.bind import resolve
    from swift.data.tasks import task_rows
    from swift.inference.context import find_context, load_context
    from swift.inference.generate import Generator

    resolved = resolve("infer", values={"model": str(model), "device": "cpu", "max_new_tokens": 8})
    generator = Generator(load_context(find_context(resolved), resolved), options=resolved.config.engine)
    rows = task_rows("reverse", 200, size=5, seed=999)
    answers = generator.batch([row["messages"][:1] for row in rows], resolved.config.generation)
    return sum(text.strip() == row["answer"] for text, row in zip(answers, rows, strict=True)) / len(rows)


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--no_results", action="store_true", help="only print; for a part of the runs")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.algorithms}
    starts = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed in arguments.seeds:
            model = warm_up(folder, seed)
            starts.append(start_of(folder, model))
            print(f"seed {seed}: {starts[-1]:.3f} right after the warm-up", flush=True)
            for name in arguments.algorithms:
                run = learn(folder, model, name, seed, arguments.steps)
                runs[name].append(run)
                last = max(run["curve"])
                print(
                    f"seed {seed}: {name}: {run['curve'][last]:.3f} right after {last} steps, "
                    f"{run['cpu_seconds']:.0f} CPU-s",
                    flush=True,
                )
    if arguments.no_results:
        return
    rows = []
    for name, found in runs.items():
        ends = [max(run["curve"]) for run in found]
        shares = [run["curve"][end] for run, end in zip(found, ends, strict=True)]
        reached = sum(share >= GOAL for share in shares)
        rows.append(
            [
                name,
                f"{reached} of {len(found)}",
                ", ".join(map(str, ends)),
                ", ".join(f"{share:.3f}" for share in shares),
                f"{median([run['cpu_seconds'] for run in found]):.0f}",
            ]
        )
    text = (
        "# Policy optimisation on a toy\n\n"
        f"Reverse five digits; 93,000 parameters, supervised warm-up until the loss is below {WARM_UP_LOSS} "
        f"({', '.join(f'{one:.3f}' for one in starts)} right after it), then at most {arguments.steps} steps of 16 "
        f"prompts\nwith 8 answers. Goal: {GOAL:.0%} of 200 other questions right, answered greedily, looked at every "
        f"{EVERY} steps.\n\n"
    )
    header = ["algorithm", "goal reached", "at step", "right", "CPU-seconds (median)"]
    write_results("rl_toy", text + markdown_table(header, rows), {"starts": starts, "runs": runs})


if __name__ == "__main__":
    main()
