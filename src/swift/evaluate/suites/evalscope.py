"""Runs inside the toolchain evalscope; imports nothing of swift. See `swift.evaluate.backends`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """EvalScope's `run_task` on the benchmarks of ``payload``; returns its version and the figures of each."""
    from evalscope import TaskConfig, run_task

    arguments = dict(payload["dataset_args"])
    local = payload["local"]
    if local:
        own = {
            "local_path": local["folder"],
            "subset_list": [local["subset"]],
            "metric_list": ["Rouge", "BLEU"],
        }
        arguments[local["name"]] = {**own, **arguments.get(local["name"], {})}
    settings: dict[str, Any] = {
        "model": payload["model"],
        "api_url": payload["url"],
        "api_key": "EMPTY",
        "eval_type": "openai_api",
        "datasets": payload["datasets"],
        "dataset_args": arguments,
        "generation_config": payload["generation"],
        "eval_batch_size": payload["num_concurrent"],
        "work_dir": payload["folder"],
        "no_timestamp": True,
        "seed": payload["seed"],
    }
    if payload["limit"] is not None:
        settings["limit"] = payload["limit"]
    reports = run_task(TaskConfig(**{**settings, **payload["extra"]}))
    return {
        "version": version("evalscope"),
        "tasks": {name: _figures(report) for name, report in reports.items()},
    }


def _figures(report: Any) -> dict[str, Any]:
    """Metric -> score over all subsets, and the number of rows. Schema 2 of its reports (EvalScope 1.14)."""
    told = report if isinstance(report, dict) else report.to_dict()
    figures: dict[str, Any] = {_name(metric["identity"]): metric["score"] for metric in told["metrics"]}
    figures["num_rows"] = next((metric["num"] for metric in told["metrics"] if metric.get("num")), None)
    return {**figures, "intervals": {}}


def _name(identity: dict[str, Any]) -> str:
    """``rouge_1_recall``: the metric, what it was taken of, and how rows were put together unless by their mean."""
    parts = [identity["name"], *identity.get("dimensions", {}).values()]
    if identity.get("aggregation") not in (None, "mean"):
        parts.append(identity["aggregation"])
    return "_".join(map(str, parts))
