"""curves.png is a picture of the promised size, also for odd metrics."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from swift.runs.curves import HEIGHT_PIXELS, WIDTH_PIXELS, draw_curves, series, smooth


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("count", [1, 2, 60])
def test_picture_of_any_length(tmp_path: Path, count: int) -> None:
    rows: list[dict[str, object]] = [
        {"step": step, "loss": 2 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 50.0}
        for step in range(1, count + 1)
    ]
    rows.append({"step": count, "eval_loss": 0.5, "eval_perplexity": math.exp(0.5)})
    write(tmp_path, rows)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert png_size(path) == (WIDTH_PIXELS, HEIGHT_PIXELS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_gaps_and_only_gaps(tmp_path: Path) -> None:
    gap = {"step": 1, "loss": None, "nonfinite": {"loss": "nan"}}
    write(tmp_path, [gap, {"step": 2, "loss": 1.0}, {**gap, "step": 3}])
    assert draw_curves(tmp_path) is not None
    write(tmp_path, [gap])
    assert draw_curves(tmp_path) is not None


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_series_tells_nan_from_not_reported() -> None:
    rows = [
        {"step": 1, "loss": 2.0, "gpu_mem_usage": None},
        {"step": 2, "loss": None, "gpu_mem_usage": None, "nonfinite": {"loss": "inf"}},
    ]
    (_, first), (step, second) = series(rows, "loss")
    assert (first, step) == (2.0, 2.0) and math.isnan(second)
    assert series(rows, "gpu_mem_usage") == []


def test_smoothing_by_hand() -> None:
    # a1 = .5*2 = 1 -> 1/.5 = 2;
    # a2 = .5*1 + .5*4 = 2.5 -> 2.5/.75; NaN passes by; a3 = .5*2.5 + .5*6 = 4.25 -> 4.25/.875.
    result = smooth([2.0, 4.0, math.nan, 6.0], weight=0.5)
    assert result[0] == pytest.approx(2.0)
    assert result[1] == pytest.approx(2.5 / 0.75)
    assert math.isnan(result[2])
    assert result[3] == pytest.approx(4.25 / 0.875)
    assert smooth([3.0] * 20) == pytest.approx([3.0] * 20)
