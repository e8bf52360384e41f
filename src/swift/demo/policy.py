"""A short reinforcement learning run for the demo: a model that answers half-heartedly learns from a reward.

Nothing here is special to the demo: it is ``swift sft`` for a moment, then ``swift rlhf demo/grpo.yaml`` with a reward
of six lines in ``demo/reward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swift.config.bind import resolve
from swift.core.files import atomic_write_text
from swift.demo.run import DEMO_MODEL
from swift.demo.task import TOKENIZER_TEXTS
from swift.models.tiny import make_tiny_model
from swift.rl.run import train
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback, RunView

__all__ = ["PolicyDemo", "run_policy_demo", "write_policy_files"]

WARM_UP_STEPS, WARM_UP_LOSS = 100, 0.7
"""At most so many steps; the loss, in nats a token, at which few answers are right and some digits are."""
NUM_STEPS = 40
_REWARD = '''"""The reward of the demo: the share of digits that stand where they should."""


def right_digits(completions, answer, **kwargs):
    return [
        sum(one == other for one, other in zip(text, wanted)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer)
    ]
'''


@dataclass(frozen=True)
class PolicyDemo:
    """What the demo measured.

    Attributes:
        run: the run folder (``swift rollouts show RUN``).
        rewards: mean reward of the sampled answers, a value for each step.
        evaluated: reward of the likeliest answers to held-out questions, at some steps.
    """

    run: Path
    rewards: list[float]
    evaluated: list[float]


def write_policy_files(folder: Path, model: Path, *, seed: int, num_steps: int = NUM_STEPS) -> Path:
    """Write ``reward.py`` and ``grpo.yaml``, which ``swift rlhf`` runs as it is; returns its path."""
    reward, config = folder / "reward.py", folder / "grpo.yaml"
    atomic_write_text(reward, _REWARD)
    options: dict[str, Any] = {
        "command": "rlhf",
        "model": {"model": str(model), "device": "cpu"},
        "data": {
            "dataset": [f"task:reverse:seed={seed + 1}#2000"],
            "val_dataset": [f"task:reverse:seed={seed + 2}#100"],
            "max_length": 32,
        },
        "rlhf": {"rlhf_type": "grpo", "beta": 0},
        "policy": {"reward_funcs": [f"{reward}:right_digits"], "num_generations": 8, "reward_num_proc": 1},
        "generation": {"max_new_tokens": 8},
        "tuner": {"tuner_type": "full"},
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "weight_decay": 0,
            "seed": seed,
            "num_threads": 1,
        },
        "evaluation": {"eval_steps": num_steps // 2},
        "checkpoint": {"output_dir": str(folder / "grpo"), "save_steps": num_steps},
        "report": {"logging_steps": 1},
    }
    atomic_write_text(config, yaml.safe_dump(options, sort_keys=False))
    return config


def run_policy_demo(
    folder: Path,
    *,
    seed: int = 42,
    num_steps: int = NUM_STEPS,
    say: Callable[[str], None] = print,
    callbacks: Sequence[Callback] = (),
) -> PolicyDemo:
    """Make a model in ``folder/grpo``, warm it up, and let it learn from its own answers."""
    config = write_policy_files(folder, _warm_up(folder / "grpo", seed), seed=seed, num_steps=num_steps)
    say(f"$ swift rlhf {config}")
    result = train(
        resolve("rlhf", [str(config)]),
        callbacks=callbacks,
        say=say,
        arguments=["swift", "rlhf", str(config)],
    )
    rows = read_metrics(result.folder / "metrics.jsonl")
    return PolicyDemo(
        result.folder,
        [row["reward"] for row in rows if row.get("reward") is not None],
        [row["eval_reward"] for row in rows if "eval_reward" in row],
    )


class _Enough(Callback):
    def on_log(self, run: RunView, metrics: dict[str, Any]) -> None:
        if metrics["loss"] < WARM_UP_LOSS:
            run.stop("warm enough")


def _warm_up(folder: Path, seed: int) -> Path:
    """A model that has seen a few answers: nothing can be rewarded where no answer is ever right."""
    model = make_tiny_model(folder / "model", texts=TOKENIZER_TEXTS, seed=seed, **DEMO_MODEL)
    values = {
        "model": str(model),
        "device": "cpu",
        "dataset": f"task:reverse:seed={seed}#{WARM_UP_STEPS * 64}",
        "tuner_type": "full",
        "max_steps": WARM_UP_STEPS,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_length": 32,
        "num_threads": 1,
        "logging_steps": 1,
        "seed": seed,
        "save_only_model": True,
        "output_dir": str(folder / "warm-up"),
    }
    run = train(resolve("sft", values=values), callbacks=[_Enough()], say=lambda text: None)
    return run.folder / "last"
