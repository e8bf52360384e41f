"""How many rows and tokens a run will see: rows are counted, tokens counted or estimated from a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.data.formats import RowError, Sample, to_sample
from swift.data.groups import sequences_of, task_format
from swift.data.hub import with_hub
from swift.data.persona import dataset_specs
from swift.data.rows import Row
from swift.data.sources import DatasetSpec, find_files, read_rows, row_numbers
from swift.data.teaching import TeachingReport

if TYPE_CHECKING:
    from swift.data.tokenise import TemplateLike

__all__ = ["RowPlan", "fit_lengths", "known_rows", "plan_rows"]

SAMPLE_ROWS = 256
"""Rows that are rendered and tokenised; data sets with no more rows are counted exactly."""
COUNT_BYTES = 256 << 20
"""Above this, a file's rows are estimated from its size: reading it through would take longer than a plan may."""
_HEAD_ROWS = 2000


@dataclass
class RowPlan:
    """Rows of one list of data sets, and the token lengths of a sample of them.

    Attributes:
        rows: rows a run takes (after ``#N`` and mixing).
        rows_exact: False when a file was too large to count.
        lengths: tokens of each sampled row, untruncated.
        sampled: rows looked at.
        datasets: name, rows in the files, rows taken.
        warnings: what could not be resolved.
        is_cut: the lengths are those after the truncation policy, which holds for each sequence of a row.
        sequences: that a row becomes: 2 of a pair of answers.
        longest: tokens of the longest sequence of such rows; None: not known.
        is_guessed: the lengths are guessed from those of the texts.
    """

    rows: int = 0
    rows_exact: bool = True
    lengths: list[int] = field(default_factory=list)
    sampled: int = 0
    datasets: list[dict[str, object]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_cut: bool = False
    sequences: int = 1
    longest: int | None = None
    is_guessed: bool = False

    @property
    def tokens_exact(self) -> bool:
        """True when every row was tokenised."""
        return not self.is_guessed and self.rows_exact and self.sampled > 0 and len(self.lengths) == self.rows

    def estimate_tokens(self, max_length: int | None, truncation: str) -> int | None:
        """Tokens of an epoch after the truncation policy; None without a sample."""
        if not self.lengths:
            return None
        kept = fit_lengths(self.lengths, max_length, truncation)
        return round(sum(kept) * self.rows / len(self.lengths))


def fit_lengths(lengths: Sequence[int], max_length: int | None, truncation: str) -> list[int]:
    """Lengths of what the truncation policy leaves of samples; as ``swift.data.tokenise`` does it."""
    result: list[int] = []
    for length in lengths:
        if max_length is None or length <= max_length:
            result.append(length)
        elif truncation in ("left", "right"):
            result.append(max_length)
        elif truncation == "split":
            starts = range(0, length - 1, max_length - 1)
            result += [min(max_length, length - start) for start in starts]
    return result


def plan_rows(
    resolved: Resolved, texts: Sequence[str], weights: Sequence[float], template: TemplateLike | None
) -> RowPlan:
    """Count the rows of ``texts`` and tokenise a sample of them (none without a template).

    What cannot be found or read becomes a warning: a plan may be made on another machine than the run.
    """
    task = task_format(resolved.config)
    plan = RowPlan(is_cut=task is not None, sequences=sequences_of(task))
    teaching = TeachingReport(all_learned=resolved.config.template.loss_scale == "all")
    sizes: list[int] = []
    found: list[float] = []
    for place, text in enumerate(texts):
        try:
            (spec,) = dataset_specs(resolved.config.data, [with_hub(text, resolved.config.model)])
            if spec.entry is not None and spec.entry.note:
                plan.warnings.append(f"{text}: {spec.entry.note}")
            files = find_files(spec)
        except SwiftError as error:
            plan.warnings.append(" ".join(str(error).split("\n")[0].split()))
            continue
        found += weights[place : place + 1]
        counts = [_count(file) for file in files]
        total = sum(count for count, _, _ in counts)
        plan.rows_exact &= all(exact for _, exact, _ in counts)
        sizes.append(total if spec.num_rows is None else spec.num_rows)
        plan.datasets.append({"name": text, "rows": total, "taken": sizes[-1], "files": len(files)})
        if template is not None:
            numbers = [known for _, _, known in counts]
            _sample(plan, resolved, spec, files, numbers, SAMPLE_ROWS // len(texts) or 1, template, teaching)
    if resolved.command == "sft" and task is None:
        plan.warnings += [f"of {plan.sampled} rows looked at, {said}" for said in teaching.sentences()]
    plan.rows = sum(sizes)
    if sum(found) > 0:
        from swift.data.mixing import mixing_counts

        taken = mixing_counts(sizes, found)
        plan.rows = sum(taken)
        for entry, count in zip(plan.datasets, taken, strict=True):
            entry["taken"] = count
    return plan


def known_rows(resolved: Resolved, lengths: Sequence[int]) -> RowPlan:
    """The same of data that is tokenised already: nothing is estimated."""
    datasets: list[dict[str, object]] = [{"name": text} for text in resolved.config.data.dataset]
    task = task_format(resolved.config)
    plan = RowPlan(len(lengths), True, list(lengths), len(lengths), datasets)
    plan.is_cut, plan.sequences = task is not None, sequences_of(task)
    return plan


def _count(file: Path) -> tuple[int, bool, list[int] | None]:
    """Rows of a file, whether they were counted, and their numbers (None: estimated)."""
    size = file.stat().st_size
    if size <= COUNT_BYTES or file.suffix.lower() == ".parquet":
        numbers = row_numbers(file)
        return len(numbers), True, numbers
    with file.open("rb") as stream:
        head = stream.read(8 << 20)
    lines = max(1, head.count(b"\n"))
    return round(size / (len(head) / lines)), False, None


def _sample(
    plan: RowPlan,
    resolved: Resolved,
    spec: DatasetSpec,
    files: Sequence[Path],
    numbers: Sequence[list[int] | None],
    wanted: int,
    template: TemplateLike,
    teaching: TeachingReport,
) -> None:
    """Tokenise rows spread evenly over the files (of uncounted files: from their start)."""
    total = sum(len(known) if known is not None else _HEAD_ROWS for known in numbers)
    every = max(1, -(-total // wanted))
    offset = 0
    for file, known in zip(files, numbers, strict=True):
        if known is None:
            rows = list(
                islice(
                    read_rows(file, resolved.config.data.columns, None, spec.mapping), 0, _HEAD_ROWS, every
                )
            )
        else:
            chosen = {number for place, number in enumerate(known, offset) if place % every == 0}
            offset += len(known)
            rows = list(read_rows(file, resolved.config.data.columns, chosen, spec.mapping)) if chosen else []
        if plan.is_cut:
            _sample_groups(plan, resolved, rows, template, file)
            continue
        samples: list[Sample] = []
        for row in rows:
            plan.sampled += 1
            teaching.look_at_columns(row.values, row.location)
            try:
                samples.append(to_sample(row))
                teaching.look_at_sample(samples[-1])
            except RowError as error:
                plan.warnings.append(f"{error.location}: {error.reason} (swift data check {file})")
        try:
            encoded = template.encode_many([(sample.messages, sample.tools) for sample in samples])
        except SwiftError as error:
            plan.warnings.append(f"{file}: {error.message}" + (f" ({error.why})" if error.why else ""))
            continue
        plan.lengths += [len(one.input_ids) for one in encoded]


def _sample_groups(
    plan: RowPlan, resolved: Resolved, rows: Sequence[Row], template: TemplateLike, file: Path
) -> None:
    """The tokens of rows that become several sequences."""
    from swift.data.tokenise import Encoder, encode_rows

    section = resolved.config.data
    task = task_format(resolved.config)
    store = encode_rows(rows, Encoder(template, section.max_length, section.truncation_strategy, task))
    plan.sampled += len(rows)
    plan.lengths += (store.offsets[1:] - store.offsets[:-1]).tolist()
    groups = [store.sequence_lengths(number) for number in range(len(store))]
    if groups:
        plan.longest = max(plan.longest or 0, *map(max, groups))
        plan.sequences = max(map(len, groups))
    plan.warnings += [f"{where}: {reason}" for where, reason in store.report.bad_rows]
    if store.report.deleted:
        count = sum(len(numbers) for numbers in store.report.deleted.values())
        plan.warnings.append(
            f"{file}: {count} of {len(rows)} rows looked at have a text longer than max_length"
            f" {section.max_length} and will be left out"
        )
