"""The demo: make a tiny model and data, ask, train through the ordinary path, ask again.

Nothing here is special to the demo: the training is ``swift sft demo/sft.yaml``, and the answers come from the same
code as ``swift infer --val_dataset``. Exact match is measured on rows that are not in the training data.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swift.config.bind import resolve
from swift.core.errors import SwiftError
from swift.core.files import atomic_write_text
from swift.demo.task import TOKENIZER_TEXTS, write_task
from swift.evaluate.answers import answer_tasks
from swift.evaluate.subjects import LocalModel
from swift.evaluate.suite import read_tasks, task_specs
from swift.inference.context import find_context, load_context
from swift.inference.generate import Generator
from swift.models.tiny import make_tiny_model
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback
from swift.train.run import train

__all__ = ["DEMO_MODEL", "GOAL", "DemoResult", "run_demo"]

GOAL = 0.9
"""Share of held-out rows that the trained model must answer exactly."""

NUM_HELDOUT = 200
BATCH_SIZE = 128

# Small rotary base and larger initial weights: with transformers' defaults (made for models a thousand times
# wider) so small a model stays on a plateau for hundreds of steps before it finds the letters' positions.
DEMO_MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_layers": 2,
    "max_position_embeddings": 64,
    "config": {
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        run: the run folder.
        before, after: answers to the held-out rows, see `swift.evaluate.answers.answer_tasks`.
        losses: the training loss as logged.
        num_parameters: of the model, all of them trained.
    """

    run: Path
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    losses: list[float]
    num_parameters: int

    @property
    def accuracy_before(self) -> float:
        return _accuracy(self.before)

    @property
    def accuracy_after(self) -> float:
        return _accuracy(self.after)


def run_demo(
    folder: Path,
    *,
    seed: int = 42,
    num_steps: int = 200,
    say: Callable[[str], None] = print,
    callbacks: Sequence[Callback] = (),
) -> DemoResult:
    """Make everything in ``folder``, train ``num_steps`` steps, answer the held-out rows before and after.

    Args:
        folder: receives ``model/``, ``train.jsonl``, ``heldout.jsonl``, ``sft.yaml`` and the run folder. A model and
            data of an earlier demo are replaced, its runs are kept.
        seed: of data, initial weights and training.
        say: receives the lines for the terminal.

    Raises:
        SwiftError: ``folder`` holds something else than an earlier demo.
    """
    model, config = folder / "model", folder / "sft.yaml"
    if model.exists() and not config.exists():
        raise SwiftError(
            "this folder holds a model that no demo has made",
            where=str(folder),
            fix="swift demo --output_dir NEW_FOLDER",
        )
    train_file, heldout = write_task(
        folder, num_train=num_steps * BATCH_SIZE, num_heldout=NUM_HELDOUT, seed=seed
    )
    atomic_write_text(config, yaml.safe_dump(_training(folder, num_steps, seed), sort_keys=False))
    make_tiny_model(model, texts=TOKENIZER_TEXTS, seed=seed, **DEMO_MODEL)
    num_parameters = _count_parameters(model)
    say(f"made {model}: {num_parameters:,} random parameters")
    say(
        f"made {train_file}: {num_steps * BATCH_SIZE:,} words to spell backwards; {NUM_HELDOUT} others are held out"
    )
    before = _answers(model, heldout, folder / "answers-before.jsonl")
    say(f"before training: {_accuracy(before):.1%} of the held-out words are right")
    say("")
    say(f"$ swift sft {config}")
    resolved = resolve("sft", [str(config)])
    result = train(resolved, callbacks=callbacks, say=say, arguments=["swift", "sft", str(config)])
    run = result.folder
    after = _answers(run / "last", heldout, run / "answers.jsonl")
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row.get("loss") is not None]
    shutil.move(folder / "answers-before.jsonl", run / "answers-before.jsonl")
    return DemoResult(run, before, after, losses, num_parameters)


def _training(folder: Path, num_steps: int, seed: int) -> dict[str, Any]:
    """The whole configuration of the training run, as a user would write it."""
    return {
        "model": {"model": str(folder / "model"), "device": "cpu"},
        "data": {
            "dataset": [str(folder / "train.jsonl")],
            "val_dataset": [str(folder / "heldout.jsonl")],
            "max_length": 64,
        },
        "tuner": {"tuner_type": "full"},
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "warmup_steps": 10,
            "seed": seed,
            "num_threads": 1,
        },
        "checkpoint": {"output_dir": str(folder), "save_steps": max(1, num_steps // 2)},
        "report": {"logging_steps": max(1, num_steps // 40)},
    }


def _answers(model: Path, heldout: Path, path: Path) -> list[dict[str, Any]]:
    """What ``swift infer --model MODEL --val_dataset HELDOUT`` answers; written to ``path`` anew."""
    path.unlink(missing_ok=True)
    values = {"model": str(model), "device": "cpu", "max_new_tokens": 8, "max_num_seqs": 100}
    resolved = resolve("infer", values={**values, "val_dataset": [str(heldout)], "metric": ["exact_match"]})
    generator = Generator(load_context(find_context(resolved), resolved), options=resolved.config.engine)
    subject = LocalModel(generator, [])
    return answer_tasks(subject, read_tasks(resolved, task_specs(resolved)), path)


def _accuracy(answers: Sequence[dict[str, Any]]) -> float:
    return sum(answer["exact_match"] for answer in answers) / len(answers)


def _count_parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a dict)
