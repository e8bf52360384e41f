"""Charts as SVG text: lines and points with axes, nothing else. Colours of axes and text come from the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["PALETTE", "Series", "line_chart", "point_chart"]

PALETTE = (
    "#2f6fb7", "#d9692b", "#3a9a5b", "#b5439b", "#8a6d1f", "#6a5acd", "#cc3d4a", "#1d9aa6", "#7a7a7a", "#7d961e",
)  # fmt: skip
_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 42
_TICKS = 6
_WIDE = 30.0
"""Positive values whose ends are this many times apart are drawn on a logarithmic axis, where that is offered."""

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """One line, or points with one name each. ``points``: (x, y), finite."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.6
    dashes: str = ""


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines on common axes; a line of one point is drawn as a dot. Empty text without any point."""
    drawn = [entry for entry in series if entry.points]
    if not drawn:
        return ""
    xs = [x for entry in drawn for x, _ in entry.points]
    ys = [y for entry in drawn for _, y in entry.points]
    scale_x, scale_y, parts = _axes(xs, ys, x_label, y_label, log_x=False, names=None)
    for entry in drawn:
        title = f"<title>{escape(entry.name)}</title>"
        if len(entry.points) == 1:
            (x, y) = entry.points[0]
            parts.append(_dot(scale_x(x), scale_y(y), entry.colour, title))
            continue
        path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in entry.points)
        dashes = f' stroke-dasharray="{escape(entry.dashes)}"' if entry.dashes else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{escape(entry.colour)}"'
            f' stroke-width="{entry.width}" stroke-linejoin="round"{dashes}>{title}</polyline>'
        )
    return _svg(parts, f"{y_label} against {x_label}")


def point_chart(
    points: Sequence[Series], *, x_label: str, y_label: str, names: Sequence[str] | None = None
) -> str:
    """A dot for each point. ``names``: the x values are numbers of these words (0, 1, ...)."""
    xs = [x for entry in points for x, _ in entry.points]
    ys = [y for entry in points for _, y in entry.points]
    if not xs:
        return ""
    log_x = names is None and min(xs) > 0 and max(xs) / min(xs) >= _WIDE
    scale_x, scale_y, parts = _axes(xs, ys, x_label, y_label, log_x=log_x, names=names)
    for entry in points:
        title = f"<title>{escape(entry.name)}</title>"
        parts += [_dot(scale_x(x), scale_y(y), entry.colour, title) for x, y in entry.points]
    return _svg(parts, f"{y_label} against {x_label}")


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{escape(colour)}" fill-opacity="0.85">{title}</circle>'


def _axes(
    xs: Sequence[float],
    ys: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    log_x: bool,
    names: Sequence[str] | None,
) -> tuple[Scale, Scale, list[str]]:
    """Scales from values to pixels, and the grid with its labels."""
    if names is not None:
        low_x, high_x, x_ticks = -0.5, len(names) - 0.5, [float(place) for place in range(len(names))]
    else:
        low_x, high_x, x_ticks = _range(min(xs), max(xs), log_x)
    low_y, high_y, y_ticks = _range(min(ys), max(ys), False)
    scale_x = _scale(low_x, high_x, _LEFT, _WIDTH - _RIGHT, log_x)
    scale_y = _scale(low_y, high_y, _HEIGHT - _BOTTOM, _TOP, False)
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for y in y_ticks:
        at = scale_y(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        at, text = scale_x(x), _number(x) if names is None else names[int(x)]
        text = text if len(text) <= 14 else text[:13] + "…"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    shown = f"{x_label} (logarithmic)" if log_x else x_label
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(shown)}</text>')
    upright = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(13 {upright}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return scale_x, scale_y, parts


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return start + share * (end - start)

    return place


def _range(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Ends of the axis, a little apart from the values, and where its labels stand."""
    if log:
        low, high = low / 1.3, high * 1.3
        decades = [
            10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ]
        factors = (1, 3) if len(decades) <= 4 else (1,)
        return low, high, [x * factor for x in decades for factor in factors if low <= x * factor <= high]
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    margin = (high - low) * 0.04
    # Steps, tokens and scores do not get below 0 by a margin.
    low, high = low - margin if low < 0 or low > margin else 0.0, high + margin
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return low, high, [place * step for place in range(first, last + 1)]


def _number(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if size >= limit:
            base = 1e3 if letter == "K" else limit
            return f"{value / base:.4g}{letter}"
    return f"{value:.4g}"
