"""What EvalScope and lm-eval are told, and how their results are read; the real ones run in tests/extras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, SwiftError
from swift.evaluate.backends import backend_of, evaluate_with, payload_of, served
from swift.evaluate.endpoint import Endpoint
from swift.evaluate.suites import evalscope, lm_eval
from swift.models.load import load_model
from swift.tuners.apply import apply_tuner
from swift.tuners.peft_format import save_adapter

URL = "http://127.0.0.1:1/v1"


def resolved(*words: str) -> Resolved:
    return resolve("eval", ["--eval_url", URL, *words])


def test_native_is_ours_for_rows_and_evalscope_for_names() -> None:
    assert backend_of(resolved("--val_dataset", "f")) == "native"
    assert backend_of(resolved("--eval_dataset", "gsm8k", "--eval_backend", "Native")) == "evalscope"
    assert backend_of(resolved("--eval_dataset", "gsm8k", "--eval_backend", "lm_eval")) == "lm-eval"
    assert backend_of(resolved("--val_dataset", "f", "--eval_backend", "EvalScope")) == "evalscope"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"query": "q1", "response": "a1"}) + "\n"
        + json.dumps({"system": "Be brief.", "query": "q2", "response": "a2"}) + "\n"
    )  # fmt: skip
    return path


def test_rows_of_ours_become_their_local_data(rows: Path, tmp_path: Path) -> None:
    words = ["--val_dataset", str(rows), "--temperature", "0.5", "--eval_limit", "1", "--eval_num_proc", "3"]
    words += ["--eval_generation_config", '{"top_p": 0.7}', "--extra_eval_args", '{"debug": true}']
    endpoint = Endpoint(URL, "m")
    for backend, expected in (
        (
            "evalscope",
            [{"query": "q1", "response": "a1"}, {"query": "q2", "response": "a2", "system": "Be brief."}],
        ),
        ("lm-eval", [{"question": "q1", "answer": "a1"}, {"question": "Be brief.\n\nq2", "answer": "a2"}]),
    ):
        # The limit is theirs to apply; here it shortens what is written, too.
        payload = payload_of(backend, resolved(*words), endpoint, tmp_path / backend)
        file = Path(payload["local"]["file"])
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected[:1]
        assert payload["datasets"] == [payload["local"]["name"]]
        assert payload["generation"] == {"max_tokens": 512, "temperature": 0.5, "top_p": 0.7, "seed": 42}
        assert (payload["limit"], payload["num_concurrent"], payload["extra"]) == (1, 3, {"debug": True})


def test_conversations_are_left_to_the_built_in_evaluators(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"query": "q", "response": "a", "history": [["x", "y"]]}) + "\n")
    with pytest.raises(ConfigError, match="one question and one answer"):
        payload_of("lm-eval", resolved("--val_dataset", str(file)), Endpoint(URL, "m"), tmp_path / "out")
    with pytest.raises(ConfigError, match="not both"):
        evaluate_with("lm-eval", resolved("--val_dataset", str(file), "--eval_dataset", "gsm8k"))


def test_a_toolchain_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    with pytest.raises(SwiftError, match="evalscope is not installed") as caught:
        evaluate_with("evalscope", resolved("--eval_dataset", "gsm8k"))
    assert caught.value.fix == "swift toolchain install evalscope"


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    asked = resolve("eval", ["--model", str(tmp_path / "gone"), "--eval_dataset", "gsm8k"])
    with pytest.raises(SwiftError, match="did not start") as caught, served(asked, print):
        pass
    assert "fix:" in (caught.value.why or "")


def test_the_adapter_is_asked_and_not_its_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    tuned = apply_tuner(load_model(tiny_model_dir, dtype=torch.float32), TunerSection(lora_rank=2))
    with torch.no_grad():
        for parameter in tuned.named_trainable().values():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(tuned.model, folder, tiny_model_dir)
    asked = resolve("eval", ["--adapters", str(folder), "--device", "cpu", "--eval_dataset", "gsm8k"])
    with served(asked, print) as endpoint:
        body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}
        assert endpoint.model == "tuned"
        own, base = endpoint.chat([body, {**body, "model": tiny_model_dir.name}])
    assert own["choices"][0]["message"] != base["choices"][0]["message"]


def test_figures_of_lm_eval() -> None:
    entry: dict[str, Any] = {
        "alias": "x", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1, "acc,strict": 1.0,
        "acc_stderr,strict": "N/A",
    }  # fmt: skip
    figures = lm_eval._figures(entry, 8)
    assert (figures["exact_match"], figures["acc_strict"], figures["num_rows"]) == (0.5, 1.0, 8)
    assert figures["intervals"]["exact_match"]["low"] == pytest.approx(0.5 - 0.196)


def test_figures_of_evalscope() -> None:
    recall = {"name": "rouge", "aggregation": "mean", "dimensions": {"ngram": 1, "statistic": "recall"}}
    passed = {"name": "acc", "aggregation": "pass@2", "dimensions": {}}
    report = {
        "metrics": [
            {"identity": recall, "score": 0.5, "num": 2},
            {"identity": passed, "score": 0.25, "num": 2},
        ]
    }
    expected = {"rouge_1_recall": 0.5, "acc_pass@2": 0.25, "num_rows": 2, "intervals": {}}
    assert evalscope._figures(report) == expected
