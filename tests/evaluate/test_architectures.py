"""`swift models verify`: real LoRA steps on tiny models of any architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.core.errors import UsageError
from swift.evaluate.architectures import (
    Result,
    causal_architectures,
    verify_architecture,
    verify_architectures,
    write_table,
)


@pytest.mark.parametrize(
    ("kind", "packing"),
    [("gpt_neox", "exact"), ("olmoe", "exact"), ("phimoe", "exact"), ("falcon", "no"), ("mamba", "no")],
)
def test_trains_saves_and_reloads(tmp_path: Path, kind: str, packing: str) -> None:
    result = verify_architecture(kind, causal_architectures()[kind], tmp_path)
    assert (result.cause, result.trained, result.packing) == ("", True, packing)
    assert 5.0 < result.loss < 8.0  # random weights over 512 tokens: log(512) = 6.2
    assert 0 <= result.difference <= 1e-5 and result.parameters > 50_000


def test_a_failure_is_a_row_with_its_cause(tmp_path: Path) -> None:
    result = verify_architecture("no_such_model", "NoSuchModel", tmp_path)
    assert not result.trained and "no architecture 'no_such_model'" in result.cause


def test_a_trial_that_hangs_is_killed() -> None:
    (result,) = verify_architectures("gpt2", deadline_seconds=0.0, say=lambda line: None)
    assert (result.trained, result.cause) == (False, "not done after 0 s")


def test_nothing_matches() -> None:
    with pytest.raises(UsageError, match="did you mean qwen3"):
        verify_architectures("qwen33")


def test_table(tmp_path: Path) -> None:
    rows = [
        Result("a", "AForCausalLM", trained=True, packing="exact", cpu_seconds=1.5),
        Result("b", "BForCausalLM", cause="RuntimeError: x | y"),
    ]
    write_table(rows, tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert "1 of 2 architectures train, 1 of them with exact packing" in text
    assert "| b | BForCausalLM | no | - | RuntimeError: x / y |" in text
