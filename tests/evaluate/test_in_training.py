"""Tasks of a suite measured during training: right, and without a trace in what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from swift.config.bind import resolve
from swift.core.errors import ConfigError, SwiftError
from swift.evaluate.training import suite_evaluators
from swift.runs.metrics import read_metrics
from swift.train.run import RunResult, train

SUITE = """
tasks:
  add:
    dataset: add.jsonl
    metric: [exact_match, loss]
    max_new_tokens: 6
  quiz:
    dataset: quiz.jsonl
    metric: choice
  guess:
    dataset: add.jsonl
    metric: numeric
    max_new_tokens: 4
    temperature: 1.0
    num_samples: 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    add = [{"query": f"Add {n} and {n}.", "response": str(2 * n)} for n in range(5)]
    quiz = [{"question": f"{n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(3)]
    for name, rows in (("add", add), ("quiz", quiz), ("train", add * 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def run(folder: Path, model: Path, name: str, **options: Any) -> RunResult:
    values = {
        "model": str(model), "dataset": str(folder / "train.jsonl"), "output_dir": str(folder / "out"),
        "run_name": name, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 1, "logging_steps": 1, "lora_dropout": 0.3, "neftune_noise_alpha": 5,
        "device": "cpu", **options,
    }  # fmt: skip
    resolved = resolve("sft", values=values)
    return train(resolved, say=lambda line: None, evaluators=suite_evaluators(resolved) or None)


def test_training_is_bit_identical_with_and_without(tiny_model_dir: Path, folder: Path) -> None:
    suite = {
        "eval_tasks": str(folder / "suite.yaml"),
        "eval_steps": 2,
        "metric_for_best_model": "eval_add_loss",
    }
    plain = run(folder, tiny_model_dir, "plain")
    measured = run(folder, tiny_model_dir, "measured", **suite)
    weights = [
        load_file(result.folder / "last" / "adapter_model.safetensors") for result in (plain, measured)
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    losses = [
        [row["loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]
        for result in (plain, measured)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    rows = [row for row in read_metrics(measured.folder / "metrics.jsonl") if "eval_add_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"eval_add_exact_match", "eval_quiz_choice", "eval_quiz_choice_norm", "eval_guess_numeric"} <= set(
        rows[0]
    )
    best = min(rows, key=lambda row: row["eval_add_loss"])
    assert measured.summary["best_step"] == best["step"] == 4  # it learns these very rows
    assert measured.summary["best_metric"] == best["eval_add_loss"]


def test_the_figures_are_those_of_swift_eval_on_the_checkpoint(tiny_model_dir: Path, folder: Path) -> None:
    from swift.evaluate.evaluation import evaluate

    suite = str(folder / "suite.yaml")
    result = run(
        folder,
        tiny_model_dir,
        "a",
        eval_tasks=suite,
        val_dataset=str(folder / "add.jsonl"),
        torch_dtype="float32",
    )
    values = {
        "adapters": [str(result.folder)],
        "eval_tasks": suite,
        "device": "cpu",
        "torch_dtype": "float32",
    }
    found = evaluate(resolve("eval", values=values), say=lambda line: None)
    row = [row for row in read_metrics(result.folder / "metrics.jsonl") if "eval_add_loss" in row][-1]
    for name in ("add.exact_match", "add.loss", "quiz.choice", "guess.numeric"):
        assert row[f"eval_{name.replace('.', '_')}"] == pytest.approx(found["metrics"][name], rel=1e-5)
    # The same rows, as validation data: the mean over the same tokens.
    assert row["eval_loss"] == pytest.approx(row["eval_add_loss"], rel=1e-5)
    assert found["folder"] == str(result.folder.resolve() / "eval" / "suite")


def test_what_cannot_be_measured_is_said_before_the_model_is_read(tiny_model_dir: Path, folder: Path) -> None:
    suite = str(folder / "suite.yaml")
    with pytest.raises(ConfigError, match="eval_loss needs validation data"):
        run(folder, tiny_model_dir, "a", eval_tasks=suite)
    with pytest.raises(ConfigError, match="no metric 'eval_add_rougeL'") as caught:
        run(folder, tiny_model_dir, "b", eval_tasks=suite, metric_for_best_model="eval_add_rougeL")
    assert "eval_add_exact_match" in (caught.value.why or "")
    resolved = resolve("sft", values={"model": "m", "dataset": "d", "eval_tasks": suite,
                                      "metric_for_best_model": "eval_add_loss"})  # fmt: skip
    with pytest.raises(ConfigError, match="nobody evaluates the tasks"):
        train(resolved)
    (folder / "suite.yaml").write_text(SUITE.replace("quiz.jsonl", "gone.jsonl"))
    with pytest.raises(SwiftError, match="task quiz: "):
        run(folder, tiny_model_dir, "c", eval_tasks=suite, metric_for_best_model="eval_add_loss")
    assert not (folder / "out").exists()
