"""The demo on the terminal: a curve in one line, answers before and after side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from swift.core.format import aligned

__all__ = ["answer_table", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#@"
_CELL_WIDTH = 14


def sparkline(values: Sequence[float], *, width: int = 48, encoding: str = "utf-8") -> str:
    """``values`` as one line of bars, the lowest value the lowest bar.

    More than ``width`` values are averaged in groups. Without block characters in ``encoding``, ASCII stands in.
    """
    if not values:
        return ""
    try:
        _BARS.encode(encoding)
        bars = _BARS
    except UnicodeEncodeError:
        bars = _PLAIN_BARS
    count = min(width, len(values))
    edges = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1)) if span else 0] for mean in means)


def answer_table(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with question, wanted answer, and the answers before and after training.

    Args:
        before, after: results of `swift.evaluate.answers.answer_tasks` for the same rows.
    """
    rows: list[tuple[str, ...]] = [("question", "wanted", "before", "after", "")]
    for old, new in zip(before, after, strict=True):
        cells = (old["messages"][-1]["content"], old["reference"], old["response"], new["response"])
        right = "ok" if new["exact_match"] == 1.0 else "wrong"
        rows.append((*(_printable(cell) for cell in cells), right))
    return aligned(rows)


def _printable(text: str) -> str:
    """An untrained model may say anything: control characters become dots, long answers are cut."""
    clean = "".join(char if char.isascii() and char.isprintable() else "." for char in text)
    return clean if len(clean) <= _CELL_WIDTH else clean[: _CELL_WIDTH - 3] + "..."
