"""Evaluates one task of three local rows with a model that answers at random."""

import json
import tempfile
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASK = {
    "task": "smoke",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def main(payload: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": i % 2}) for i in range(3)))
        task = {
            **TASK,
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(Path(folder) / "cache")},
        }
        (Path(folder) / "smoke.yaml").write_text(yaml.safe_dump(task))
        manager = TaskManager(include_path=folder, include_defaults=False)
        found = simple_evaluate(
            model="dummy", tasks=["smoke"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    accuracy = found["results"]["smoke"]["acc,none"]
    return {"rows": len(found["samples"]["smoke"]), "accuracy": round(accuracy, 3)}
