"""Results as text: the figures of an evaluation, its answers one by one, and two of them side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.sections.evaluation import smaller_is_better
from swift.core.errors import UsageError
from swift.core.format import aligned
from swift.evaluate.answers import intervals
from swift.evaluate.results import SAMPLES, read_results, row_metrics
from swift.evaluate.statistics import Interval, paired_bootstrap, sign_flip_p

__all__ = ["Difference", "compare", "comparison_lines", "find_samples", "show", "tables"]

_THEIRS = ("reports/report.html", "lm_eval_samples.jsonl")
"""Where EvalScope and lm-eval keep answers, in the folder of an evaluation."""


def find_samples(place: str) -> Path:
    """The result file meant: itself, in its folder, or the newest of a run.

    Raises UsageError; for an evaluation by EvalScope or lm-eval with the file in which they keep the answers.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if (path / SAMPLES).is_file():
        return path / SAMPLES
    found = [*path.glob(f"eval/*/{SAMPLES}"), *path.glob("infer-*.jsonl")]
    theirs = [path / name for name in _THEIRS if (path / name).exists()]
    theirs += [] if found else [file for name in _THEIRS for file in path.glob(f"eval/*/{name}")]
    if theirs:
        raise UsageError(
            "the answers of this evaluation are in the files of the program that made it",
            where=place,
            fix=f"look into {theirs[0]}; swift compare shows its figures",
        )
    if not found:
        raise UsageError("there are no results", where=place, fix="swift eval --model RUN --val_dataset FILE")
    return max(found, key=lambda file: file.stat().st_mtime)


def tables(results: Mapping[str, Any]) -> list[str]:
    """The figures of ``results.json``, a block of lines for each task."""
    lines: list[str] = []
    for name, task in results["tasks"].items():
        rows = [["metric", "value", "95 % interval", "rows"]]
        for metric, value in task.items():
            if not isinstance(value, int | float) or metric in (
                "num_rows",
                "num_references",
                "max_new_tokens",
            ):
                continue
            interval = task["intervals"].get(metric)
            shown = f"{interval['low']:.4g} to {interval['high']:.4g}" if interval else ""
            number = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append([metric, number, shown, str(interval["num_rows"]) if interval else ""])
        lines += [f"{name}: {task['num_rows']} rows", *(f"  {line}" for line in aligned(rows))]
    return lines


def show(
    rows: Sequence[Mapping[str, Any]], *, metric: str | None, worst: int | None, wrong: bool
) -> list[str]:
    """Answers one by one. ``wrong``: those without the full score; ``worst``: the N worst.

    Without ``metric``, each row counts by its first one. Rows whose scoring failed are always shown. Raises UsageError
    for a metric that no row has.
    """
    names = list(dict.fromkeys(name for row in rows for name in row_metrics(row)))
    if metric is not None and metric not in names:
        why = f"there are: {', '.join(names)}"
        raise UsageError(f"no row has a metric {metric!r}", where="--metric", why=why)
    chosen = list(rows) if metric is None else [row for row in rows if metric in row_metrics(row)]
    if wrong or worst is not None:
        scored = [(_score(row, metric), row) for row in chosen if metric or row_metrics(row)]
        best = max((score for score, _ in scored), default=0.0)
        full = 1.0 if 0 <= best <= 1 else best
        if wrong:
            scored = [(score, row) for score, row in scored if score < full]
        if worst is not None:
            scored = sorted(scored, key=lambda entry: entry[0])[:worst]
        chosen = [row for _, row in scored]
    failed = [row for row in rows if "judge_error" in row and not any(row is other for other in chosen)]
    lines: list[str] = []
    for row in [*chosen, *failed]:
        lines += [*_block(row), ""]
    return [*lines, f"{len(chosen) + len(failed)} of {len(rows)} rows"]


def _score(row: Mapping[str, Any], metric: str | None) -> float:
    """Higher is better."""
    metrics = row_metrics(row)
    name = metric or next(iter(metrics))
    return -metrics[name] if smaller_is_better(name) else metrics[name]


def _block(row: Mapping[str, Any]) -> list[str]:
    scores = "  ".join(f"{name} {value:.4g}" for name, value in row_metrics(row).items())
    task = f"{row['task']} " if row.get("task") else ""
    lines = [f"[{task}{row['index']}] {row['location']}  {scores}"]
    lines += _labelled("question", str(row["messages"][-1].get("content") or ""))
    if "choices" in row:
        lines += _labelled("choices", " | ".join(row["choices"]))
    if "reference" in row:
        lines += _labelled("wanted", row["reference"])
    for text in row.get("responses") or [row.get("response", "")]:
        lines += _labelled("answer", text)
    for name in ("failure", "judge_error", "judge_says"):
        if row.get(name):
            lines += _labelled(name, str(row[name]))
    return lines


def _labelled(label: str, text: str) -> list[str]:
    printable = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
    wrapped = [part for line in printable.splitlines() or [""] for part in textwrap.wrap(line, 100) or [""]]
    return [f"  {label if number == 0 else '':10} {line}".rstrip() for number, line in enumerate(wrapped)]


@dataclass(frozen=True)
class Difference:
    """One metric of two result files on the rows both have.

    Attributes:
        difference: second minus first, with its interval (paired bootstrap).
        p_value: of "both are alike" (paired permutation test).
        better, worse: rows in which the second has the better, and the worse value.
    """

    task: str
    metric: str
    first: Interval
    second: Interval
    difference: Interval | None
    p_value: float | None
    better: int
    worse: int


def compare(first: Path, second: Path) -> list[Difference]:
    """Every metric that both files have, on the rows both answered. Raises UsageError when there are none."""
    sides = [_by_data(read_results(path)) for path in (first, second)]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        raise UsageError(
            "the two have no row in common", where=f"{first}, {second}", why="other data or other tasks"
        )
    found = []
    for task in dict.fromkeys(key[0] for key in shared):
        pairs = [(sides[0][key], sides[1][key]) for key in shared if key[0] == task]
        names = [row_metrics(row) for pair in pairs for row in pair]
        for metric in dict.fromkeys(name for entry in names for name in entry):
            both = [(a, b) for a, b in pairs if metric in row_metrics(a) and metric in row_metrics(b)]
            if both:
                found.append(_difference(task, metric, both))
    return found


def _difference(task: str, metric: str, pairs: Sequence[tuple[Any, Any]]) -> Difference:
    ours, theirs = ([row_metrics(pair[side])[metric] for pair in pairs] for side in (0, 1))
    counts = [[float(pair[side].get("num_loss_tokens") or 0) for pair in pairs] for side in (0, 1)]
    weights = counts if metric == "loss" else [None, None]
    sign = -1 if smaller_is_better(metric) else 1
    changes = [sign * (new - old) for old, new in zip(ours, theirs, strict=True)]
    sides = [intervals([pair[side] for pair in pairs])[metric] for side in (0, 1)]
    return Difference(
        task,
        metric,
        sides[0],
        sides[1],
        paired_bootstrap(theirs, ours, weights[1], weights[0]),
        sign_flip_p(theirs, ours, weights[1], weights[0]),
        sum(change > 0 for change in changes),
        sum(change < 0 for change in changes),
    )


def _by_data(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows by task and question, whatever model answered; equal ones by their place among each other."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        text = repr((row["messages"], row.get("reference"), row.get("choices")))
        key = str(row.get("task") or ""), text
        seen[key] = seen.get(key, 0) + 1
        found[(*key, seen[key])] = row
    return found


def comparison_lines(found: Sequence[Difference]) -> list[str]:
    rows = [["metric", "A", "B", "B - A (95 %)", "p", "better", "worse", "rows"]]
    for entry in found:
        gap = entry.difference
        rows.append(
            [
                f"{entry.task}.{entry.metric}" if entry.task else entry.metric,
                f"{entry.first.mean:.4g}",
                f"{entry.second.mean:.4g}",
                f"{gap.mean:+.4g} ({gap.low:+.4g} to {gap.high:+.4g})" if gap else "",
                f"{entry.p_value:.2g}" if entry.p_value is not None else "",
                str(entry.better),
                str(entry.worse),
                str(entry.first.num_rows),
            ]
        )
    return aligned(rows)
