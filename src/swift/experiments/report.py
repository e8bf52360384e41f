"""The comparison as one HTML file that needs nothing from anywhere: no script, no font, no picture of another site."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swift.core.format import format_bytes, format_count, format_duration
from swift.evaluate.statistics import Interval, is_number
from swift.experiments.charts import PALETTE, Series, line_chart, point_chart
from swift.experiments.compare import TRAINING_METRICS, Comparison
from swift.experiments.outcome import Outcome, Point
from swift.runs.curves import smooth

__all__ = ["Column", "format_value", "render_html", "split_common", "table_of"]

_POINTS = 20_000
"""Of all lines of one chart together; more is cut evenly, for the size of the file."""
_SMOOTHED_FROM = 60
_SAMPLES, _SAMPLE_COLUMNS, _SAMPLE_LETTERS = 12, 12, 1500
_DASHES = ("", "6 3", "2 3")
_AXES: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("step", lambda point: point.step),
    ("tokens", lambda point: point.tokens),
    ("time (s)", lambda point: point.seconds),
)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        cells: what it says of each row; "" for nothing.
        explanation: what the figure counts, where the title does not tell.
    """

    title: str
    cells: list[str]
    is_text: bool = False
    explanation: str = ""


def format_value(value: Any) -> str:
    """A figure as people read it: four digits; other values as they are; "" for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def table_of(comparison: Comparison) -> list[Column]:
    """The columns that have anything to say."""
    rows = comparison.rows
    parameters = dict.fromkeys(name for row in rows for name in row.parameters)
    columns = [
        Column("experiment", [row.experiment for row in rows], True),
        Column("state", [_state(row) for row in rows], True),
        *(Column(name, [format_value(row.parameters.get(name)) for row in rows]) for name in parameters),
        Column("last loss", [format_value(row.last_loss) for row in rows]),
        Column("best loss", [format_value(row.best_loss) for row in rows]),
        *(Column(name, [format_value(row.training.get(name)) for row in rows]) for name in TRAINING_METRICS),
        *(
            Column(
                "evaluation.loss" if name == "loss" else name,
                [_with_interval(row.evaluation.get(name), row.intervals.get(name)) for row in rows],
            )
            for name in dict.fromkeys(name for row in rows for name in row.measured())
        ),
        Column("tokens", [_unless_none(format_count, row.num_tokens) for row in rows]),
        Column(
            "time",
            [_unless_none(format_duration, row.wall_seconds or row.seconds) for row in rows],
            explanation="of the training, all attempts",
        ),
        Column(
            "device-hours",
            [_unless_none(lambda s: f"{s / 3600:.2g}", row.device_seconds) for row in rows],
            explanation="of the whole experiment: training and stages, all attempts",
        ),
        Column(
            "memory (estimate)",
            [_memory(row) for row in rows],
            explanation="peak of the training, and what its plan had said",
        ),
        Column(
            "retries",
            [str(len(row.retries) or "") for row in rows],
            explanation="of the training, not of its stages",
        ),
    ]
    return [column for column in columns if any(column.cells)]


def split_common(columns: Sequence[Column], keep: str) -> tuple[list[Column], list[Column]]:
    """(columns that tell the rows apart, columns that say the same of all); what repeats another column is in neither.

    Args:
        keep: title of a column that stays among the first whatever it says.
    """
    apart: list[Column] = []
    common: list[Column] = []
    for column in columns:
        if column.title in ("experiment", keep) or len(column.cells) < 2:
            apart.append(column)
        elif len(set(column.cells)) == 1:
            common.append(column)
        elif not (column.title.startswith("best") and column.cells in [other.cells for other in apart]):
            apart.append(column)
    return apart, common


def _unless_none(form: Callable[[Any], str], value: Any) -> str:
    return "" if value is None else form(value)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return format_value(value)
    return f"{value:.4g} [{interval.low:.3g}, {interval.high:.3g}]"


def _state(row: Outcome) -> str:
    if row.state in ("running", "paused", "pausing") and row.total_steps:
        return f"{row.state} {row.step or 0}/{row.total_steps}"
    return row.state


def _memory(row: Outcome) -> str:
    if row.peak_memory_bytes is None and row.estimated_memory_bytes is None:
        return ""
    peak = "-" if row.peak_memory_bytes is None else format_bytes(row.peak_memory_bytes)
    estimate = row.estimated_memory_bytes
    return peak if estimate is None else f"{peak} ({format_bytes(estimate)})"


def render_html(comparison: Comparison) -> str:
    """The whole page. All texts are escaped; a content security policy forbids scripts and every outside resource."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("swift.experiments", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns, common = split_common(table_of(comparison), comparison.metric)
    cells = list(zip(*(column.cells for column in columns), strict=True))
    colours = {id(row): PALETTE[place % len(PALETTE)] for place, row in enumerate(comparison.rows)}
    curves = {
        title: [(label, Markup(chart)) for label, chart in charts]
        for title, charts in _curves(comparison).items()
    }
    sweeps = [Markup(chart) for chart in _sweeps(comparison) if chart]
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        created=datetime.datetime.fromtimestamp(comparison.created).isoformat(" ", "seconds"),
        value=format_value(comparison.winner.value) if comparison.winner else "",
        columns=columns,
        common=common,
        table=[
            (row, colours[id(row)], row_cells) for row, row_cells in zip(comparison.rows, cells, strict=True)
        ],
        curves=curves,
        sweeps=sweeps,
        differences=_differences(comparison),
        samples=_samples(comparison),
        sample_rows=[row for row in comparison.rows if row.answers][:_SAMPLE_COLUMNS],
        troubled=[
            row for row in comparison.rows if row.failures or row.retries or row.stage_retries or row.problems
        ],
        format_value=format_value,
        describe=_describe,
    )


def _curves(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    """Title -> (x-axis, chart): training loss and evaluation loss against steps, tokens and time."""
    smoothed = any(len(row.losses) >= _SMOOTHED_FROM for row in comparison.rows)
    found: dict[str, list[tuple[str, str]]] = {}
    for title, y_label, points_of in (
        ("Training loss" + (" (smoothed)" if smoothed else ""), "loss", _smoothed),
        ("Evaluation loss", "eval_loss", lambda row: row.eval_losses),
    ):
        lines = [points_of(row) for row in comparison.rows]
        if any(lines):
            found[title] = [
                (label, _line_chart(comparison, lines, label, x_of, y_label)) for label, x_of in _AXES
            ]
    return found


def _line_chart(
    comparison: Comparison,
    lines: Sequence[Sequence[Point]],
    x_label: str,
    x_of: Callable[[Point], float],
    y_label: str,
) -> str:
    most = max(40, _POINTS // len(lines))
    series = []
    for place, (row, line) in enumerate(zip(comparison.rows, lines, strict=True)):
        thinned = [line[index * len(line) // most] for index in range(most)] if len(line) > most else line
        points = [(x_of(point), point.value) for point in [*thinned, *line[-1:]]]
        series.append(
            Series(
                row.experiment,
                points if len(line) > 1 else points[:1],
                PALETTE[place % len(PALETTE)],
                2.8 if place == 0 and comparison.winner else 1.4,
                _DASHES[place // len(PALETTE) % len(_DASHES)],
            )
        )
    # The winner is drawn last, on top.
    return line_chart(series[::-1], x_label=x_label, y_label=y_label)


def _smoothed(row: Outcome) -> list[Point]:
    if len(row.losses) < _SMOOTHED_FROM:
        return row.losses
    values = smooth([point.value for point in row.losses])
    return [
        Point(point.step, point.tokens, point.seconds, value)
        for point, value in zip(row.losses, values, strict=True)
    ]


def _sweeps(comparison: Comparison) -> list[str]:
    """The metric against each parameter that took two values or more."""
    charts = []
    names = dict.fromkeys(name for row in comparison.rows for name in row.parameters)
    for name in names:
        told = [
            (place, row.parameters[name], value)
            for place, row in enumerate(comparison.rows)
            if name in row.parameters and (value := row.value(comparison.metric)) is not None
        ]
        if len({repr(setting) for _, setting, _ in told}) < 2:
            continue
        words = None
        if not all(is_number(setting) for _, setting, _ in told):
            words = sorted({format_value(setting) for _, setting, _ in told})
        series = [
            Series(
                f"{comparison.rows[place].experiment}: {name} {format_value(setting)}, "
                f"{comparison.metric} {format_value(value)}",
                [(float(setting) if words is None else float(words.index(format_value(setting))), value)],
                PALETTE[place % len(PALETTE)],
            )
            for place, setting, value in told
        ]
        charts.append(point_chart(series, x_label=name, y_label=comparison.metric, names=words))
    return charts


def _differences(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """(experiment, (metric, difference to the winner with interval))."""
    return [
        (
            row.experiment,
            [
                (name, f"{gap.mean:+.4g} [{gap.low:+.3g}, {gap.high:+.3g}] on {gap.num_rows} rows")
                for name, gap in row.against_best.items()
            ],
        )
        for row in comparison.rows
        if row.against_best
    ]


def _samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Held-out rows that all shown experiments answered, first those in which the answers differ."""
    rows = [row for row in comparison.rows if row.answers][:_SAMPLE_COLUMNS]
    if not rows:
        return []
    answers = [{answer.key: answer for answer in row.answers} for row in rows]
    shared = [answer for answer in rows[0].answers if all(answer.key in known for known in answers)]
    shared.sort(key=lambda answer: len({known[answer.key].response for known in answers}) == 1)
    return [
        {
            "question": _cut(answer.question),
            "reference": _cut(answer.reference or ""),
            "answers": [
                (_cut(said.response), said.metrics.get("exact_match") == 1.0, said.is_cut)
                for said in (known[answer.key] for known in answers)
            ],
        }
        for answer in shared[:_SAMPLES]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _SAMPLE_LETTERS else text[:_SAMPLE_LETTERS] + " …"


def _describe(record: dict[str, Any]) -> str:
    """A retry or a failure in one line, whatever it holds."""
    return "; ".join(
        f"{key.replace('_', ' ')}: {format_value(value)}"
        for key, value in record.items()
        if key != "job" and value not in (None, "", [], {})
    )
