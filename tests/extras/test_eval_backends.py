"""The real EvalScope and lm-eval, in their toolchains (swift toolchain install), against a small server of the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))
from fake_openai import chat_reply, fake_server

from swift.config.bind import resolve
from swift.evaluate.backends import evaluate_with
from swift.toolchains.toolchain import installed_toolchains


def right_once(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    reply = chat_reply("6" if "3 and 3" in text else "no")
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return 200, {}, {**reply, "id": "x", "created": 1, "model": "fake-model", "usage": usage}


@pytest.mark.parametrize(("backend", "metric"), [("evalscope", "rouge_1_recall"), ("lm-eval", "exact_match")])
def test_rows_of_ours(backend: str, metric: str, tmp_path: Path) -> None:
    if backend not in installed_toolchains():
        pytest.skip(f"swift toolchain install {backend}")
    rows = [{"query": "Add 3 and 3.", "response": "6"}, {"query": "Add 4 and 3.", "response": "7"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with fake_server(right_once) as server:
        values = {
            "eval_url": server.url,
            "val_dataset": [str(file)],
            "eval_output_dir": str(tmp_path / "out"),
        }
        results = evaluate_with(backend, resolve("eval", values=values))
    (task,) = results["tasks"].values()
    assert task[metric] == 0.5 and task["num_rows"] == 2
