"""``curves.png``: how a run went, in one picture. matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.runs.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curves", "smooth"]

CURVES_NAME = "curves.png"
WIDTH_PIXELS, HEIGHT_PIXELS, DPI = 1300, 780, 100
_RAW, _MAIN, _SECOND = "#b8c7dc", "#1f5fa8", "#d1682c"

Points = list[tuple[float, float]]

_MEASURES = (
    ("token accuracy", "token_accuracy", "eval_token_accuracy"),
    ("mean reciprocal rank", "mrr", "eval_mrr"),
    ("accuracy", "accuracy", "eval_accuracy"),
    ("correlation", "pearson", "eval_pearson"),
)


def draw_curves(folder: Path) -> Path | None:
    """Draw ``metrics.jsonl`` of a run folder to ``curves.png``; returns its path, None without any metrics.

    Panels: loss (raw and smoothed, evaluation on top), token accuracy, learning rate, gradient norm, tokens per
    second, and device memory or else the evaluation's perplexity. What a run did not report says so.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would keep global state and look for a display.
    figure = Figure(figsize=(WIDTH_PIXELS / DPI, HEIGHT_PIXELS / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_title(folder, rows), fontsize=11, x=0.01, ha="left", color="#444444")
    loss, accuracy, rate, norm, speed, last = figure.subplots(2, 3).flat
    # Fixed margins: matplotlib's layout engines draw everything twice to find them.
    figure.subplots_adjust(left=0.045, right=0.985, top=0.905, bottom=0.065, wspace=0.2, hspace=0.26)
    _panel(loss, "loss", series(rows, "loss"), series(rows, "eval_loss"), smoothed=True)
    title, trained, evaluated = _quality(rows)
    _panel(accuracy, title, trained, evaluated)
    _panel(rate, "learning rate", series(rows, "learning_rate"))
    _panel(norm, "gradient norm", series(rows, "grad_norm"), smoothed=True)
    _panel(speed, "tokens per second", series(rows, "tokens_per_second"), smoothed=True)
    memory = series(rows, "gpu_mem_usage")
    if memory:
        _panel(last, "device memory (GiB)", memory)
    else:
        _panel(last, "perplexity", [], series(rows, "eval_perplexity"))
    path = folder / CURVES_NAME
    descriptor, temporary = tempfile.mkstemp(prefix=f".{CURVES_NAME}.", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            canvas.print_png(file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _quality(rows: Sequence[dict[str, Any]]) -> tuple[str, Points, Points]:
    """Title and points of how right the model is: the first measure, of several tasks, that the run has."""
    for title, trained, evaluated in _MEASURES:
        found = series(rows, trained), series(rows, evaluated)
        if any(found):
            return title, *found
    return _MEASURES[0][0], [], []


def series(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(step, value) of the lines that have a number under ``key``; a null (it was not finite) becomes NaN."""
    points: Points = []
    for row in rows:
        if key in row and "step" in row:
            value = row[key]
            if value is None and key not in row.get("nonfinite", {}):
                continue
            points.append((float(row["step"]), math.nan if value is None else float(value)))
    return points


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull towards the start (divided by ``1 - weight**n``).

    NaN stays NaN at its place and does not spread.
    """
    average, count, result = 0.0, 0, []
    for value in values:
        if math.isnan(value):
            result.append(value)
            continue
        count += 1
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def _panel(
    axes: Axes, title: str, points: Points, evaluation: Points | None = None, *, smoothed: bool = False
) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#222222")
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#555555")
    if not points and not evaluation:
        axes.text(
            0.5, 0.5, "not reported", ha="center", va="center", color="#999999", transform=axes.transAxes
        )
        axes.set_xticks([])
        axes.set_yticks([])
        return
    from matplotlib.ticker import MaxNLocator

    # A marker shows a point that has no neighbour to be joined with: short runs, and between gaps.
    marker = "o" if len(points) <= 30 else ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    with_average = smoothed and len(points) > 30
    if points:
        axes.plot(
            steps, values, color=_RAW if with_average else _MAIN, linewidth=1.2, marker=marker, markersize=3
        )
    if with_average:
        axes.plot(
            steps,
            smooth(values, 1 - 2 / (len(values) / 20 + 4)),
            color=_MAIN,
            linewidth=1.6,
            label="smoothed",
        )
        _leave_out_spikes(axes, values)
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color=_SECOND, linewidth=1.4, marker="o", markersize=4)
        axes.plot([], [], color=_SECOND, marker="o", markersize=4, label="evaluation")
        axes.legend(fontsize=8, frameon=False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6), useOffset=False)
    axes.set_xlabel("step", fontsize=8, color="#555555")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _leave_out_spikes(axes: Axes, values: Sequence[float]) -> None:
    """Cut the view above a spike: a single huge value would press everything else flat."""
    finite = sorted(value for value in values if not math.isnan(value))
    usual = finite[int(0.98 * (len(finite) - 1))]
    low, span = finite[0], usual - finite[0]
    if span > 0 and finite[-1] > usual + 2 * span:
        axes.set_ylim(low - 0.05 * span, usual + 0.5 * span)


def _title(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    last = max(int(row.get("step", 0)) for row in rows)
    return f"{folder.name}   {last} steps"
