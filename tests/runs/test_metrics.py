"""metrics.jsonl: every line valid JSON, whatever happened to the writer."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from swift.core.errors import DataError
from swift.runs import metrics as metrics_module
from swift.runs.metrics import MetricsLog, read_metrics


def test_lines_are_visible_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    log.close()


def test_cut_line_is_not_read_and_is_repaired_on_open(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(path)
    log.append({"step": 2, "loss": 1.5})
    log.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'


def test_only_line_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st' + "x" * 200_000)  # longer than one block of the search for a newline
    MetricsLog(path).close()
    assert path.read_bytes() == b""


def test_cut_line_behind_a_long_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "y" * 150_000)
    MetricsLog(path).close()
    assert path.read_text() == '{"step": 1}\n'


def test_not_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 3, "loss": float("nan"), "grad_norm": float("-inf"), "learning_rate": 0.1})
    log.close()
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 0.1,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }


def test_scalars_of_arrays(tmp_path: Path) -> None:
    import numpy

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": numpy.int64(4), "loss": numpy.float32(0.5), "bad": numpy.float32("nan")})
    log.close()
    assert read_metrics(path) == [{"step": 4, "loss": 0.5, "bad": None, "nonfinite": {"bad": "nan"}}]


def test_truncate_after_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (5, 10, 15, 20):
        log.append({"step": step, "loss": 1.0})
    log.append({"step": 10, "eval_loss": 0.5})
    assert log.truncate_after(10) == 2
    assert log.truncate_after(10) == 0
    log.append({"step": 15, "loss": 0.9})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 10, 15]


def test_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    write = os.write
    calls = []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    monkeypatch.setattr(metrics_module.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        log.append({"step": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'
    log.append({"step": 2})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
