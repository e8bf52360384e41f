"""What a plan says about the data: rows, tokens, lengths, what the truncation policy does to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.plan.light import GuessedTemplate, LightTokenizer
from swift.plan.rows import RowPlan, fit_lengths, plan_rows

if TYPE_CHECKING:
    from swift.data.tokenise import TemplateLike

__all__ = ["count_validation", "data_part", "planned_rows"]

LONG_SHARE = 0.02
"""More rows than this above max_length are worth a warning."""


def planned_rows(resolved: Resolved, folder: Path | None, warnings: list[str]) -> RowPlan:
    """The rows of the training data; without the model's folder their tokens are guessed."""
    section = resolved.config.data
    template: TemplateLike | None = None
    if folder is None and section.dataset:
        template = GuessedTemplate()
    elif folder is not None and section.dataset:
        from swift.models.template import Template

        try:
            template = Template(LightTokenizer(folder), resolved.config.template, resolved.command == "pt")
        except ConfigError:
            raise
        except SwiftError as error:
            warnings.append(f"tokens are not counted: {error.one_line()}")
    rows = plan_rows(resolved, section.dataset, section.dataset_weights, template)
    rows.is_guessed = folder is None
    shown = rows.warnings[:3]
    warnings += shown
    if len(rows.warnings) > len(shown):
        warnings.append(f"and {len(rows.warnings) - len(shown)} more rows of the sample cannot be used")
    return rows


def data_part(resolved: Resolved, rows: RowPlan, warnings: list[str]) -> tuple[dict[str, Any], list[int]]:
    """The data part, and the lengths of the sampled rows after the truncation policy."""
    section = resolved.config.data
    if not rows.datasets:
        return {}, []
    limit, policy = None if rows.is_cut else section.max_length, section.truncation_strategy
    long = sum(length > limit for length in rows.lengths) if limit else 0
    lengths = fit_lengths(rows.lengths, limit, policy)
    if rows.lengths and long / len(rows.lengths) > LONG_SHARE:
        what = {"delete": "left out", "split": "split"}.get(policy, f"cut at the {policy}")
        warnings.append(
            f"{long / len(rows.lengths):.0%} of the rows are longer than max_length {limit} and will be {what}"
        )
    validation = count_validation(resolved, rows, warnings)
    train_rows = rows.rows - (validation if not section.val_dataset else 0)
    share = train_rows / rows.rows if rows.rows else 0
    tokens = rows.estimate_tokens(limit, policy)
    data: dict[str, Any] = {
        "rows": train_rows,
        "rows_exact": rows.rows_exact,
        "validation_rows": validation,
        "tokens": None if tokens is None else round(tokens * share),
        "tokens_exact": rows.tokens_exact and share == 1,
        "tokens_guessed": rows.is_guessed,
        "sampled_rows": rows.sampled,
        "longer_than_max_length": round(long / len(rows.lengths), 4) if rows.lengths else None,
        "datasets": rows.datasets,
    }
    if rows.lengths:
        ordered = sorted(rows.lengths)
        data["length"] = {
            "mean": round(sum(ordered) / len(ordered), 1),
            "median": ordered[len(ordered) // 2],
            "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "max": ordered[-1],
        }
    return data, lengths


def count_validation(resolved: Resolved, rows: RowPlan, warnings: list[str]) -> int:
    """How many rows are evaluated: those of ``val_dataset``, or those that are split off."""
    section = resolved.config.data
    if section.val_dataset:
        validation = plan_rows(resolved, section.val_dataset, [], None)
        warnings += validation.warnings
        return validation.rows
    if section.split_dataset_ratio > 0 and rows.rows > 1:
        return min(max(1, round(rows.rows * section.split_dataset_ratio)), rows.rows - 1)
    return 0
