"""Tasks of a suite on several ranks, each of which answers its share: the figures of one process."""

import json
import os
from pathlib import Path

import pytest
from worker_pool import pool, slow_but

from swift.runs.metrics import read_metrics

SUITE = """
tasks:
  add: {dataset: add.jsonl, metric: [exact_match, loss], max_new_tokens: 6}
  quiz: {dataset: quiz.jsonl, metric: choice}
  guess: {dataset: add.jsonl, metric: numeric, max_new_tokens: 4, temperature: 1.0, num_samples: 2}
"""
LAYOUTS = {
    "copies": {"data_parallel_size": 2},
    "shards": {"fsdp": "full", "nproc_per_node": 2},
    "layers shared": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "sequence shared": {"context_parallel_size": 2},
}


def train_on(rank, values):
    os.environ["SWIFT_HOME"] = str(Path(values["output_dir"]) / "home")
    from swift.config.bind import resolve
    from swift.evaluate.training import suite_evaluators
    from swift.train.run import train

    resolved = resolve("sft", values=values)
    train(resolved, say=lambda line: None, evaluators=suite_evaluators(resolved))


def measured(run):
    wanted, other = ("eval_", "loss", "step"), ("eval_seconds", "step_time")
    return [
        {key: value for key, value in row.items() if key.startswith(wanted) and key not in other}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", slow_but(["shards"], list(LAYOUTS)))
def test_the_figures_are_those_of_one_process(tiny_model_dir, tmp_path, monkeypatch, name):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    add = [{"query": f"Add {n} and {n}.", "response": str(2 * n)} for n in range(5)]
    quiz = [{"question": f"{n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(3)]
    for file, rows in (("add", add), ("quiz", quiz), ("train", add * 4)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    values = {
        "model": str(tiny_model_dir), "dataset": str(tmp_path / "train.jsonl"), "max_steps": 4, "eval_steps": 2,
        "per_device_train_batch_size": 2, "global_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "eval_tasks": str(tmp_path / "suite.yaml"), "output_dir": str(tmp_path / "out"), "device": "cpu",
        "metric_for_best_model": "eval_add_loss", "save_strategy": "no", "torch_dtype": "float32", "max_restarts": 0,
        "lora_dropout": 0.0,  # what ranks drop is their own
    }  # fmt: skip
    train_on(0, {**values, "run_name": "one"})
    pool(2).run(train_on, {**values, **LAYOUTS[name], "run_name": "two"}, seconds=300.0)
    rows, others = (measured(tmp_path / "out" / run) for run in ("two", "one"))
    assert [row["step"] for row in rows if "eval_add_loss" in row] == [2, 4]
    assert {"eval_add_exact_match", "eval_quiz_choice", "eval_guess_numeric"} <= set(rows[-1])
    assert rows == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in others]
