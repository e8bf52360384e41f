"""Experiments side by side: which setting won, by how much, and what it cost."""

from __future__ import annotations

import csv
import functools
import io
import math
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from swift.config.sections.evaluation import smaller_is_better
from swift.core.errors import UsageError
from swift.core.registry import suggest
from swift.evaluate.statistics import Interval, paired_bootstrap
from swift.experiments.home import Home
from swift.experiments.importance import Importance, parameter_importance
from swift.experiments.outcome import ANSWER_METRICS, Outcome, checkpoint_of, is_loss, read_outcome
from swift.experiments.types import Job

__all__ = ["TRAINING_METRICS", "Comparison", "Winner", "collect"]

_DEFAULT_METRICS = ("eval_loss", "evaluation.loss", "loss")
TRAINING_METRICS = ("eval_loss", "best_eval_loss", "eval_token_accuracy", "eval_perplexity")
_NAMES_OF_RUNS = ("run_name", "output_dir", "resume_from_checkpoint", "result_path", "eval_output_dir")


@dataclass(frozen=True)
class Winner:
    """The best experiment by the metric.

    Attributes:
        final: every experiment has ended; otherwise it only leads so far.
        not_clearly_better_than: experiments whose difference on the evaluated rows might be chance.
        next_commands: what to do with it.
    """

    experiment: str
    id: str | None
    run_dir: str | None
    value: float
    final: bool
    not_clearly_better_than: list[str]
    next_commands: list[str]


@dataclass
class Comparison:
    """All experiments, the best first, then those without a value in the order of submission.

    Attributes:
        name: of the submission, or what was compared.
        metric, minimize, why: what decides, and where that comes from.
        created: when it was read (wall clock).
    """

    name: str
    metric: str
    minimize: bool
    why: str
    rows: list[Outcome]
    winner: Winner | None
    created: float
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def importance(self) -> Importance | None:
        """Found when it is first asked for: fANOVA's libraries take seconds to import."""
        points = [(row.parameters, row.value(self.metric)) for row in self.rows if row.state == "succeeded"]
        known = [(parameters, value) for parameters, value in points if value is not None]
        return parameter_importance([parameters for parameters, _ in known], [value for _, value in known])

    @property
    def num_finished(self) -> int:
        return sum(row.finished for row in self.rows)

    def to_dict(self, *, curves: bool = False) -> dict[str, Any]:
        """Plain data for JSON (docs/en/comparison.md names every key). ``curves``: with the points of all curves."""
        return {
            "name": self.name,
            "created": self.created,
            "metric": self.metric,
            "minimize": self.minimize,
            "metric_from": self.why,
            "experiments": len(self.rows),
            "finished": self.num_finished,
            "winner": asdict(self.winner) if self.winner else None,
            "importance": asdict(self.importance) if self.importance else None,
            "notes": self.notes,
            "rows": [self._row(row, rank, curves) for rank, row in enumerate(self.rows, 1)],
        }

    def _row(self, row: Outcome, rank: int, curves: bool) -> dict[str, Any]:
        value = row.value(self.metric)
        left_out = {"options", "explicit", "answers", "device_seconds"}
        left_out |= set() if curves else {"losses", "eval_losses"}
        lean = asdict(replace(row, answers=[]))
        return {
            "rank": rank if value is not None else None,
            **{name: entry for name, entry in lean.items() if name not in left_out},
            "value": value,
            "group": row.group or None,
            **{name: row.training.get(name) for name in TRAINING_METRICS},
            "device_hours": row.device_seconds / 3600 if row.device_seconds is not None else None,
        }

    def to_csv(self) -> str:
        """One line per experiment, nested values in columns of their own (``parameters.lora_rank``)."""
        table = [_flat(self._row(row, rank, False)) for rank, row in enumerate(self.rows, 1)]
        columns = list(dict.fromkeys(name for row in table for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return text.getvalue()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings become columns with dotted names, lists of records their number."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name in ("retries", "stage_retries", "failures"):
            flat[name] = len(value)
        elif name != "problems":
            flat[prefix + name] = value
    return {name: value for name, value in flat.items() if not name.startswith("training.")}


def collect(
    jobs: Sequence[Job],
    *,
    name: str | None = None,
    metric: str | None = None,
    declared: tuple[str, bool] | None = None,
    home: Home | None = None,
    now: float | None = None,
) -> Comparison:
    """Compare experiments by what their run folders and job records say at this moment. Nothing is written.

    Jobs may be in any state and files may be missing or half-written. The experiment with the best value among those
    that succeeded wins; while none has, the best of the others leads.

    Args:
        jobs: trainings with their stages, also of several submissions (or `job_of_folder`).
        name: what to call it; default: the submission's name.
        metric: what decides; default: the declared one, else what ``metric_for_best_model`` says, else eval_loss, the
            evaluation's loss, or the last loss: the first that any experiment has.
        declared: metric of the sweep, and whether it is minimized.
        home: the service's folder, for the times of all attempts.
        now: wall clock, for jobs that run.

    Raises UsageError for a metric that no experiment has.
    """
    now = time.time() if now is None else now
    experiments: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        # Run folders that no service knows may have the same name.
        key = (job.group, job.spec.experiment if job.group else str(job.spec.run_dir))
        experiments.setdefault(key, []).append(job)
    rows = [read_outcome(group, home, now) for group in experiments.values()]
    groups = {row.group for row in rows}
    _tell_apart(rows)
    if len(groups) > 1 or groups == {""} or not any(row.parameters for row in rows):
        _find_differences(rows)
    chosen, why = _choose_metric(rows, metric, declared)
    minimize = declared[1] if declared and declared[0] == chosen else smaller_is_better(chosen)
    rows = _ranked(rows, chosen, minimize)
    kinds = _kinds_of_loss(rows) if chosen in ("eval_loss", "loss") else []
    winner = _winner(rows, chosen) if len(kinds) < 2 or why == "as asked" else None
    return Comparison(
        name or ", ".join(sorted(filter(None, groups))) or "runs",
        chosen,
        minimize,
        why,
        rows,
        winner,
        now,
        notes=[*_notes(rows), *_note_on_losses(kinds, chosen)],
    )


def _tell_apart(rows: Sequence[Outcome]) -> None:
    """Put the submission, or else the folder, before names that are there twice."""
    counts = Counter(row.experiment for row in rows)
    for row in rows:
        if counts[row.experiment] > 1:
            row.experiment = f"{row.group or Path(str(row.run_dir)).parent.name}/{row.experiment}"


def _find_differences(rows: Sequence[Outcome]) -> None:
    """Set ``parameters`` to the options that somebody set and that are not the same everywhere."""
    told = [row for row in rows if row.options]
    names = sorted({name for row in told for name in row.explicit if name not in _NAMES_OF_RUNS})
    for name in names:
        if len({repr(row.options.get(name)) for row in told}) > 1:
            for row in told:
                if row.options.get(name) is not None:
                    row.parameters.setdefault(name, row.options[name])


def _choose_metric(
    rows: Sequence[Outcome], asked: str | None, declared: tuple[str, bool] | None
) -> tuple[str, str]:
    known = list(dict.fromkeys(name for row in rows for name in row.metrics()))
    if asked is not None:
        expected = (*known, *_DEFAULT_METRICS, *TRAINING_METRICS, *ANSWER_METRICS)
        if asked not in expected and asked.removeprefix("evaluation.") not in expected:
            raise UsageError(
                f"no experiment has a metric {asked!r}",
                where="--metric",
                why=f"there are: {', '.join(known) or 'none yet'}",
                fix=suggest(asked, known),
            )
        return asked, "as asked"
    if declared is not None:
        return declared[0], "the sweep's metric"
    wanted = {
        row.options.get("metric_for_best_model") for row in rows if "metric_for_best_model" in row.explicit
    }
    if len(wanted) == 1 and (name := wanted.pop()) in known:
        return str(name), "metric_for_best_model"
    for name in _DEFAULT_METRICS:
        if any(row.value(name) is not None for row in rows):
            return name, "default"
    return _DEFAULT_METRICS[0], "default"


def _ranked(rows: Sequence[Outcome], metric: str, minimize: bool) -> list[Outcome]:
    """The best first; what is equal is ordered by eval_loss, then by the last loss."""

    def order(row: Outcome) -> tuple[float, ...]:
        value = row.value(metric)
        if value is None:
            return (3,)
        standing = {"succeeded": 0, "failed": 2, "cancelled": 2}.get(row.state, 1)
        losses = [math.inf if loss is None else loss for loss in (row.value("eval_loss"), row.last_loss)]
        return (standing, value if minimize else -value, *losses)

    return sorted(rows, key=order)


def _winner(rows: Sequence[Outcome], metric: str) -> Winner | None:
    """The first row, if it has a value and has not failed; sets ``against_best`` of the others."""
    best = rows[0] if rows else None
    value = best.value(metric) if best is not None else None
    if best is None or value is None or best.state in ("failed", "cancelled"):
        return None
    for row in rows[1:]:
        row.against_best = _differences(row, best)
    of_answers = metric.removeprefix("evaluation.") if not metric.startswith("eval_") else ""
    doubtful = [
        row.experiment
        for row in rows[1:]
        if metric != "loss"
        and (difference := row.against_best.get(of_answers)) is not None
        and difference.low <= 0 <= difference.high
    ]
    final = all(row.finished for row in rows)
    commands = _next_commands(best, of_answers in best.intervals and metric != "loss")
    return Winner(best.experiment, best.id, best.run_dir, value, final, doubtful, commands)


def _kinds_of_loss(rows: Sequence[Outcome]) -> list[str]:
    """What the losses of the experiments that have one are those of: next tokens, or a method of `swift rlhf`."""
    told = [
        row
        for row in rows
        if row.options and (row.last_loss is not None or row.value("eval_loss") is not None)
    ]
    return sorted({_kind_of_loss(row.options) for row in told})


def _kind_of_loss(options: Mapping[str, Any]) -> str:
    task = options.get("task_type")
    return str(options.get("rlhf_type") or (task if task not in (None, "causal_lm") else "sft"))


def _note_on_losses(kinds: Sequence[str], metric: str) -> list[str]:
    if len(kinds) < 2:
        return []
    return [
        f"the losses of {', '.join(kinds)} are different quantities: {metric} says nothing here, --metric NAME does"
    ]


def _differences(row: Outcome, best: Outcome) -> dict[str, Interval]:
    """Metric -> the row's mean minus the best one's, over the rows of data that both have answered."""
    theirs = {answer.key: answer for answer in best.answers}
    found = {}
    for name in best.intervals:
        pairs = [
            (answer, theirs[answer.key])
            for answer in row.answers
            if name in answer.metrics and name in getattr(theirs.get(answer.key), "metrics", ())
        ]
        interval = paired_bootstrap(
            [ours.metrics[name] for ours, _ in pairs],
            [other.metrics[name] for _, other in pairs],
            [float(ours.num_loss_tokens) for ours, _ in pairs] if is_loss(name) else None,
            [float(other.num_loss_tokens) for _, other in pairs] if is_loss(name) else None,
        )
        if interval is not None:
            found[name] = interval
    return found


def _next_commands(best: Outcome, by_answers: bool) -> list[str]:
    """How to use the winner. The evaluation answers with the last checkpoint; for other metrics the best is named."""
    commands = []
    checkpoint = checkpoint_of(best, best=not by_answers)
    if checkpoint is not None:
        path = shlex.quote(str(checkpoint))
        flag = "--adapters" if best.options.get("tuner_type", "lora") == "lora" else "--model"
        if best.options.get("rlhf_type") == "rm":
            commands += [f"swift deploy {flag} {path}"]
        elif best.options.get("tuner_type", "lora") == "lora":
            commands += [f"swift infer --adapters {path}", f"swift merge-lora --adapters {path}"]
        else:
            commands += [f"swift infer --model {path}"]
    if best.id is not None:
        commands.append(f"swift clone {best.id}")
    elif best.run_dir is not None:
        config, name = shlex.quote(f"{best.run_dir}/config.yaml"), shlex.quote(Path(best.run_dir).name + "-2")
        commands.append(f"swift {best.command} {config} --run_name {name}")
    return commands


def _notes(rows: Sequence[Outcome]) -> list[str]:
    """What a reader of the table must know about its figures."""
    notes = []
    if len({len(row.answers) for row in rows if row.answers}) > 1:
        notes.append(
            "the experiments have not answered the same number of rows: differences use the shared ones"
        )
    cut = [
        f"{row.experiment} {sum(answer.is_cut for answer in row.answers) / len(row.answers):.0%}"
        for row in rows
        if any(answer.is_cut for answer in row.answers)
    ]
    if cut:
        limits = sorted({row.evaluation.get("max_new_tokens", 0) for row in rows} - {0})
        at = f" at {' or '.join(f'{limit:.0f}' for limit in limits)} tokens" if limits else ""
        more = f" and {len(cut) - 8} more" if len(cut) > 8 else ""
        notes.append(f"answers cut off{at} (max_new_tokens): {', '.join(cut[:8])}{more}")
    if any(row.intervals for row in rows):
        notes.append(
            "intervals: 95 %, bootstrap over the rows of data; other seeds of training are not in them"
        )
    return notes
