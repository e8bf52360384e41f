"""An experiments file: train, merge, quantise what was merged. Real jobs, one after another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import swift

pytestmark = pytest.mark.slow


def test_train_merge_export(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"query": f"Say {n}", "response": f"{n} and {n}"}) + "\n" for n in range(40))
    )
    common = {"model": str(tiny_model_dir), "dataset": str(data), "split_dataset_ratio": 0.2, "device": "cpu"}
    values = {
        "name": "export",
        "defaults": {**common, "max_steps": 3, "learning_rate": 1e-2, "output_dir": str(tmp_path / "out")},
        "experiments": {"a": {}},
        "after": {
            "merge": {},
            "export": {"needs": "merge", "model": "{merged}", "quant_method": "bnb", "quant_bits": 8},
            "direct": {"command": "export", "quant_method": "bnb", "parity_tokens": 300},
        },
    }
    (row,) = swift.run_experiments(values, inline=True, show=False)
    assert row["state"] == "succeeded", row
    run = tmp_path / "out" / "a"
    merged, exported, direct = (
        json.loads((run / name / "parity.json").read_text()) for name in ("merged", "exported", "direct")
    )
    assert merged["method"] == "merge" and merged["text"].endswith("(as in the run)") and merged["passed"]
    assert exported["original"] == str(run / "merged") and exported["settings"]["bits"] == 8
    assert direct["merge"]["relative"] < 1e-3 and direct["text"] == merged["text"]
    assert direct["difference"]["perplexity_before"] == pytest.approx(
        merged["difference"]["perplexity_after"], rel=0.2
    )
