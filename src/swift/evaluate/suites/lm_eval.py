"""Runs inside the toolchain lm-eval; imports nothing of swift. See `swift.evaluate.backends`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

_OWN_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: false
    ignore_punctuation: false
"""


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `simple_evaluate` on the benchmarks of ``payload``; returns its version and the figures of each.

    Generated answers come from chat completions. Benchmarks that compare log-probabilities need plain completions with
    echoed ones, and a tokenizer: ``extra_eval_args '{"model": "local-completions"}'``.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(payload["folder"])
    manager = TaskManager()
    if payload["local"]:
        tasks = folder / "lm_eval_tasks"
        tasks.mkdir(exist_ok=True)
        own = payload["local"]
        (tasks / f"{own['name']}.yaml").write_text(
            _OWN_TASK.format(name=own["name"], file=json.dumps(own["file"])), encoding="utf-8"
        )
        manager = TaskManager(include_path=str(tasks))
    extra = dict(payload["extra"])
    kind = extra.pop("model", "local-chat-completions")
    chat = kind == "local-chat-completions"
    arguments: dict[str, Any] = {
        "model": payload["model"],
        "base_url": f"{payload['url']}/{'chat/completions' if chat else 'completions'}",
        "num_concurrent": payload["num_concurrent"],
        "max_retries": 3,
        "tokenized_requests": False,
        "tokenizer_backend": None if chat else "huggingface",
    }
    if not chat and payload["tokenizer"]:
        arguments["tokenizer"] = payload["tokenizer"]
    generation = {
        "max_gen_toks" if key == "max_tokens" else key: value for key, value in payload["generation"].items()
    }
    results = lm_eval.simple_evaluate(
        **{
            "model": kind,
            "model_args": {**arguments, **extra.pop("model_args", {})},
            "tasks": payload["datasets"],
            "limit": payload["limit"],
            "gen_kwargs": generation,
            "apply_chat_template": chat,
            "task_manager": manager,
            "random_seed": payload["seed"],
            "log_samples": True,
            **extra,
        }
    )
    (folder / "lm_eval.json").write_text(
        json.dumps({key: value for key, value in results.items() if key != "samples"}, default=str, indent=1)
    )
    with (folder / "lm_eval_samples.jsonl").open("w", encoding="utf-8") as file:
        for name, rows in results.get("samples", {}).items():
            for row in rows:
                file.write(json.dumps({"task": name, **row}, default=str, ensure_ascii=False) + "\n")
    counts = results.get("n-samples", {})
    tasks_found = {
        name: _figures(entry, counts.get(name, {}).get("effective"))
        for name, entry in results["results"].items()
    }
    return {"version": version("lm_eval"), "tasks": tasks_found}


def _figures(entry: dict[str, Any], num_rows: int | None) -> dict[str, Any]:
    """``exact_match,none`` is called exact_match; its standard error becomes a 95 % interval."""
    figures: dict[str, Any] = {"num_rows": num_rows, "intervals": {}}
    for key, value in entry.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
            continue
        name = metric if chosen == "none" else f"{metric}_{chosen}"
        figures[name] = value
        error = entry.get(f"{metric}_stderr,{chosen}")
        if isinstance(error, int | float):
            low, high = value - 1.96 * error, value + 1.96 * error
            figures["intervals"][name] = {"mean": value, "low": low, "high": high, "num_rows": num_rows}
    return figures
