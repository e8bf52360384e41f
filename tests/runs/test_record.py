"""What a run writes down about itself, and what it must not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from swift.config.bind import resolve
from swift.runs import record
from swift.runs.record import (
    data_fingerprint,
    model_fingerprint,
    redact_arguments,
    write_environment,
    write_provenance,
    write_summary,
)


def test_provenance(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "x"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345")
    resolved = resolve("sft", ["--model", "m", "--dataset", "a.jsonl", "--seed", "7"])
    write_provenance(
        tmp_path,
        resolved,
        arguments=["swift", "sft", "--hub_token", "hf_abc"],
        data_files=[tmp_path / "a.jsonl"],
        model_path=tmp_path / "model",
        extra={"template": "abc"},
    )
    seen = json.loads((tmp_path / "provenance.json").read_text())
    assert seen["command_line"] == ["swift", "sft", "--hub_token", "***"]
    assert (seen["seed"], seen["template"], seen["command"]) == (7, "abc", "sft")
    assert seen["data"][0]["sha256"] == hashlib.sha256(b'{"query": "x"}\n').hexdigest()
    assert seen["model"]["weights"] == {"model.safetensors": 5}
    assert seen["sources"]["seed"] == "--seed" and "lora_rank" not in seen["sources"]
    assert seen["versions"]["torch"]
    assert "hf_abc" not in (tmp_path / "provenance.json").read_text()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--hub-token=x", "--lr", "1"], ["--hub-token=***", "--lr", "1"]),
        (["--api_key", "x", "y"], ["--api_key", "***", "y"]),
        (["--token", "--lr", "1"], ["--token", "--lr", "1"]),
        (["--max_new_tokens", "5"], ["--max_new_tokens", "5"]),
    ],
)
def test_secrets_on_the_command_line(given: list[str], shown: list[str]) -> None:
    assert redact_arguments(given) == shown


def test_environment_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MY_PASSWORD", "hunter2")
    write_environment(tmp_path, [{"kind": "cpu"}])
    text = (tmp_path / "env.json").read_text()
    seen = json.loads(text)
    assert seen["variables"]["OMP_NUM_THREADS"] == "1"
    assert seen["variables"]["HF_TOKEN"] == "***"
    assert "hf_secret" not in text and "hunter2" not in text
    assert seen["devices"] == [{"kind": "cpu"}] and seen["python"].count(".") == 2


def test_large_files_are_hashed_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_WHOLE_FILE_BYTES", 10)
    monkeypatch.setattr(record, "_PART_BYTES", 4)
    path = tmp_path / "big"
    path.write_bytes(b"0123456789abcdef")
    seen = data_fingerprint(path)
    assert seen["sha256_first_and_last_64_mib"] == hashlib.sha256(b"0123cdef").hexdigest()
    assert "sha256" not in seen and seen["bytes"] == 16


def test_model_without_files(tmp_path: Path) -> None:
    assert model_fingerprint(tmp_path) == {"path": str(tmp_path), "config_sha256": None, "weights": {}}


def test_summary_is_valid_json(tmp_path: Path) -> None:
    write_summary(tmp_path, {"last_loss": float("nan"), "steps": 3})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"last_loss": None, "steps": 3, "nonfinite": {"last_loss": "nan"}}
    assert os.listdir(tmp_path) == ["summary.json"]  # noqa: PTH208 - hidden leftovers count as well
