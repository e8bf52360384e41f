"""What one experiment has come to: read from its run folder and the records of its jobs, whatever is there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swift.config.sections.generation import METRICS
from swift.core.errors import DataError
from swift.core.files import read_json
from swift.evaluate.results import RESULTS, SAMPLES, row_metrics
from swift.evaluate.statistics import Interval, bootstrap, is_number
from swift.experiments.home import Home
from swift.experiments.serving import SERVING
from swift.experiments.types import ACTIVE, FINISHED, TRAINING, Job, JobSpec
from swift.runs.folder import RunFolder
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status

__all__ = [
    "ANSWER_METRICS",
    "RESULT_FOLDER",
    "Answer",
    "Outcome",
    "Point",
    "is_loss",
    "job_of_folder",
    "read_outcome",
]

ANSWER_METRICS = tuple(name for names in METRICS.values() for name in names if "{" not in name)
"""What the built-in evaluators measure."""
RESULT_FOLDER = Path("eval") / "evaluate"
"""Where the stage evaluate leaves its results in the run folder."""
_GIB = 1 << 30
_FOLDER_STATES = {
    "starting": "running", "running": "running", "saving": "running", "stopped": "paused", "lost": "failed",
}  # fmt: skip
"""State of a run that no service manages -> state of a job; the others are called the same."""


@dataclass(frozen=True)
class Point:
    """A place on a curve; ``seconds`` are those of training steps, evaluations and saves left out."""

    step: int
    tokens: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Answer:
    """One row of an evaluation: ``key`` names the row, the same for all experiments that answered it.

    ``is_cut``: max_new_tokens ended the answer.
    """

    key: str
    question: str
    reference: str | None
    response: str
    metrics: dict[str, float]
    num_loss_tokens: int
    is_cut: bool = False


@dataclass
class Outcome:
    """One experiment.

    Attributes:
        parameters: in what it differs from the others.
        options: all options of its run, flat; those set by the user in ``explicit``.
        training: last ``eval_*`` values of the training, and the best ``eval_loss`` as ``best_eval_loss``.
        evaluation: means over the answered rows; ``intervals``: how sure they are.
        against_best: metric -> difference to the winner's on the same rows.
        seconds: of training steps; ``wall_seconds`` of the training's processes, all attempts, where known.
        device_seconds: over all jobs of the experiment: its stages cost, too (not how long its model is served).
        retries: what was changed for each relaunch of the training; ``stage_retries``: of its stages.
        failures: job, state and reason of what did not succeed.
        problems: files that could not be read.
    """

    experiment: str
    group: str
    id: str | None
    state: str
    reason: str
    command: str
    run_dir: str | None
    parameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    explicit: set[str] = field(default_factory=set)
    finished: bool = False
    step: int | None = None
    total_steps: int | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_loss_step: int | None = None
    training: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    against_best: dict[str, Interval] = field(default_factory=dict)
    num_tokens: int | None = None
    seconds: float | None = None
    wall_seconds: float | None = None
    device_seconds: float | None = None
    peak_memory_bytes: int | None = None
    estimated_memory_bytes: int | None = None
    attempts: int = 0
    retries: list[dict[str, Any]] = field(default_factory=list)
    stage_retries: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    losses: list[Point] = field(default_factory=list)
    eval_losses: list[Point] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def value(self, metric: str) -> float | None:
        """The metric that judges: ``loss`` and ``eval_*`` are the training's last values, the rest the evaluation's
        means (``evaluation.loss`` for the one that has the training's name), as in a sweep."""
        if metric == "loss":
            return self.last_loss
        if metric == "best_loss":
            return self.best_loss
        if metric.startswith(("eval_", "best_eval_")):
            return self.training.get(metric)
        return self.evaluation.get(metric.removeprefix("evaluation."))

    def metrics(self) -> list[str]:
        """Names that ``value`` knows now."""
        own = [name for name in ("loss", "best_loss") if self.value(name) is not None]
        answers = [
            name for name in self.evaluation if name != "loss" and name.rpartition(".")[2] not in _COUNTS
        ]
        return [
            *own, *self.training, *answers, *(["evaluation.loss"] if "loss" in self.evaluation else [])
        ]  # fmt: skip

    def measured(self) -> list[str]:
        """What the evaluation tells of the model: means with intervals, figures of all rows at once, and everything
        that a program of others measured."""
        names = dict.fromkeys((*self.intervals, *self.evaluation))
        return [
            name
            for name in names
            if name in self.intervals
            or name.rpartition(".")[2].startswith("corpus_")
            or (not self.answers and name.rpartition(".")[2] not in _COUNTS)
        ]


_COUNTS = ("num_rows", "num_references", "num_bad_rows", "max_new_tokens", "judge_failures")


def is_loss(metric: str) -> bool:
    """A mean over tokens, not over rows: ``loss`` and ``TASK.loss``."""
    return metric.rpartition(".")[2] == "loss"


def job_of_folder(path: Path) -> Job:
    """A run folder that no service knows, as a job that has ended, runs, or was stopped."""
    status = read_status(path) or {}
    state = _FOLDER_STATES.get(status.get("state", ""), status.get("state", "paused"))
    reason = status.get("message") or ("its process is gone" if status.get("state") == "lost" else "")
    command = _read_config(path, []).get("command", "sft")
    spec = JobSpec(path.name, path.name, command, run_dir=str(path))
    return Job(id="", group="", spec=spec, state=state, reason=reason)


def read_outcome(jobs: Sequence[Job], home: Home | None, now: float) -> Outcome:
    """The outcome of one experiment, given its jobs: the training (or whatever it is) first, then its stages.

    Args:
        home: where the attempts of the jobs are recorded; None: only their last start and end are known.
        now: for jobs that still run.
    """
    main = next((job for job in jobs if job.spec.name == job.spec.experiment), jobs[0])
    spec = main.spec
    measured = [
        job for job in jobs if job is main or job.spec.command not in SERVING
    ]  # a server adds no figure
    outcome = Outcome(
        spec.experiment, main.group, main.id or None, main.state, main.reason, spec.command, spec.run_dir,
        parameters=dict(spec.parameters), options=dict(spec.options), explicit=set(spec.options),
        finished=all(job.state in FINISHED for job in measured), attempts=main.attempt,
        estimated_memory_bytes=spec.estimate.get("memory_bytes"), total_steps=spec.estimate.get("steps"),
    )  # fmt: skip
    for job in jobs:
        retries = outcome.retries if job is main else outcome.stage_retries
        retries += [{"job": job.spec.name, **retry} for retry in job.retries]
    outcome.failures = [
        {"job": job.spec.name, "state": job.state, "exit_code": job.exit_code, "reason": job.reason}
        for job in jobs
        if job.state in ("failed", "cancelled") and not _was_not_needed(job)
    ]
    _read_attempts(outcome, main, measured, home, now)
    if spec.run_dir is not None and spec.command in TRAINING:
        _read_run(outcome, Path(spec.cwd) / spec.run_dir)
    for path in _evaluation_files(main, jobs):
        if path.exists():
            _read_evaluation(outcome, path)
            break
        if path.name == SAMPLES and (path.parent / RESULTS).exists():
            _read_figures(outcome, path.parent / RESULTS)
            break
    return outcome


def _was_not_needed(job: Job) -> bool:
    """A stage for failures that never came: that it did not run is no trouble."""
    conditions = {need.condition for need in job.spec.after}
    return job.state == "cancelled" and job.attempt == 0 and conditions == {"failure"}


def _read_attempts(outcome: Outcome, main: Job, jobs: Iterable[Job], home: Home | None, now: float) -> None:
    for job in jobs:
        attempts = _attempts_of(job, home, now)
        if not attempts:
            continue
        spent = sum(attempt.seconds * attempt.num_devices for attempt in attempts)
        outcome.device_seconds = (outcome.device_seconds or 0.0) + spent
        if job is main:
            outcome.wall_seconds = sum(attempt.seconds for attempt in attempts)
            peaks = [attempt.peak_memory_bytes for attempt in attempts if attempt.peak_memory_bytes]
            outcome.peak_memory_bytes = max(peaks, default=None)


@dataclass(frozen=True)
class _Attempt:
    """How long a job's process lived, on how many devices, and its peak of host memory where it is known."""

    seconds: float
    num_devices: int
    peak_memory_bytes: int | None = None


def _attempts_of(job: Job, home: Home | None, now: float) -> list[_Attempt]:
    """All attempts of a job. The store knows the last one only; a job of several is read from its folder.

    Args:
        home: where attempts are recorded; None: only the last one is known.
        now: for a job that still runs.
    """
    devices = len(job.placement.devices) if job.placement else 1
    found = []
    folders = [home.attempt_dir(job.id, number) for number in range(1, job.attempt + 1)] if home else []
    for number, folder in enumerate(folders, start=1):
        try:
            begun = (folder / "supervisor.json").stat().st_mtime
            lost = max(path.stat().st_mtime for path in folder.iterdir())
        except OSError:  # never started
            continue
        ended = read_json(folder / "exit.json")
        running = job.state in ACTIVE and number == job.attempt
        seconds = max(0.0, float(ended.get("ended", now if running else lost)) - begun)
        found.append(_Attempt(seconds, devices, ended.get("peak_memory_bytes")))
    end = job.ended if job.ended is not None else now if job.state in ACTIVE else None
    if not found and job.started is not None and end is not None:
        found = [_Attempt(max(0.0, end - job.started), devices)]
    return found


def _read_run(outcome: Outcome, folder: Path) -> None:
    config = _read_config(folder, outcome.problems)
    outcome.explicit |= set(config.pop("explicit", ()))
    config.pop("command", None)
    for section in config.values():
        outcome.options |= section if isinstance(section, dict) else {}
    status, summary = read_status(folder) or {}, read_json(folder / "summary.json")
    outcome.step, outcome.total_steps = status.get("step"), status.get("total_steps") or outcome.total_steps
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except (DataError, OSError) as error:
        outcome.problems.append(str(error))
        rows = []
    _read_curves(outcome, rows)
    if outcome.seconds is not None and summary.get("steps") == outcome.step:
        outcome.seconds = summary.get("train_seconds") or outcome.seconds
    measured = [row.get("gpu_mem_usage") for row in rows] + [summary.get("peak_memory_gib")]
    gib = max(filter(None, measured), default=None)
    if gib is not None:
        outcome.peak_memory_bytes = round(gib * _GIB)


def _read_curves(outcome: Outcome, rows: Iterable[dict[str, Any]]) -> None:
    step, tokens, seconds = 0, 0, 0.0
    for row in rows:
        tokens = int(row.get("num_tokens") or tokens)
        if "step_time" in row:
            seconds += (row["step"] - step) * (row["step_time"] or 0.0)
        step = row.get("step", step)
        if is_number(row.get("loss")):
            outcome.losses.append(Point(step, tokens, seconds, row["loss"]))
        if is_number(row.get("eval_loss")):
            outcome.eval_losses.append(Point(step, tokens, seconds, row["eval_loss"]))
        outcome.training |= {
            name: value for name, value in row.items() if name.startswith("eval_") and is_number(value)
        }
    outcome.training.pop("eval_seconds", None)
    if step:
        outcome.step, outcome.num_tokens, outcome.seconds = max(step, outcome.step or 0), tokens, seconds
    if outcome.losses:
        best = min(outcome.losses, key=lambda point: point.value)
        outcome.last_loss = outcome.losses[-1].value
        outcome.best_loss, outcome.best_loss_step = best.value, best.step
    if outcome.eval_losses:
        outcome.training["best_eval_loss"] = min(point.value for point in outcome.eval_losses)


def _evaluation_files(main: Job, jobs: Iterable[Job]) -> list[Path]:
    """Where the answers of this experiment may lie: its evaluate stage's file first, then those of other stages."""
    stages = sorted(jobs, key=lambda job: job.spec.name != f"{main.spec.experiment}/evaluate")
    files = []
    for job in stages:
        options = job.spec.options
        if options.get("eval_output_dir"):
            files.append(Path(job.spec.cwd) / options["eval_output_dir"] / SAMPLES)
        elif options.get("result_path"):
            files.append(Path(job.spec.cwd) / options["result_path"])
    if main.spec.run_dir is None:
        return files
    run = Path(main.spec.cwd) / main.spec.run_dir
    found = [*run.glob(f"eval/*/{SAMPLES}"), *run.glob(f"eval/*/{RESULTS}")]
    others = [file for file in found if file.parent != run / RESULT_FOLDER]
    newest = sorted(others, key=lambda file: file.stat().st_mtime, reverse=True)
    named = dict.fromkeys(file.parent / SAMPLES for file in newest)
    return [*files[:1], run / RESULT_FOLDER / SAMPLES, *files[1:], *named]


def _read_evaluation(outcome: Outcome, path: Path) -> None:
    try:
        results = read_metrics(path)
        outcome.answers = _answers(results)
    except (DataError, OSError, KeyError, TypeError) as error:
        outcome.problems.append(f"{path} cannot be read: {error}")
        return
    for name in dict.fromkeys(name for answer in outcome.answers for name in answer.metrics):
        chosen = [answer for answer in outcome.answers if name in answer.metrics]
        weights = [float(answer.num_loss_tokens) for answer in chosen] if is_loss(name) else None
        interval = bootstrap([answer.metrics[name] for answer in chosen], weights)
        if interval is not None and is_number(interval.mean):
            outcome.intervals[name] = interval
            outcome.evaluation[name] = interval.mean
    # Absent while rows are still being answered.
    in_folder = path.name == SAMPLES
    summary = (
        read_json(path.parent / RESULTS).get("metrics", {})
        if in_folder
        else read_json(path.with_suffix(".json"))
    )
    outcome.evaluation |= {name: value for name, value in summary.items() if is_number(value)}
    outcome.evaluation["num_rows"] = len(results)


def _read_figures(outcome: Outcome, path: Path) -> None:
    """Of EvalScope and lm-eval, which keep rows in forms of their own: means, and intervals where they tell some."""
    results = read_json(path)
    outcome.evaluation |= {
        name: value for name, value in results.get("metrics", {}).items() if is_number(value)
    }
    tasks = results.get("tasks", {})
    for task, figures in tasks.items():
        outcome.intervals |= {
            f"{task}.{name}": Interval(**interval) for name, interval in figures.get("intervals", {}).items()
        }
    if not outcome.evaluation:
        outcome.problems.append(f"{path} holds no metrics")
        return
    outcome.evaluation["num_rows"] = sum(figures.get("num_rows") or 0 for figures in tasks.values())


def _answers(results: Sequence[dict[str, Any]]) -> list[Answer]:
    seen: dict[str, int] = {}
    answers = []
    for result in results:
        # Not the file's own key, which depends on the model.
        task = f"{result['task']}." if result.get("task") else ""
        row = [task, result["messages"], result.get("reference"), result.get("choices")]
        text = json.dumps(row, ensure_ascii=False, sort_keys=True)
        seen[text] = seen.get(text, 0) + 1
        answers.append(
            Answer(
                key=f"{text}#{seen[text]}",
                question=_text(result["messages"][-1].get("content")),
                reference=result.get("reference"),
                response=result.get("response", ""),
                metrics={task + name: value for name, value in row_metrics(result).items()},
                num_loss_tokens=int(result.get("num_loss_tokens") or 0),
                is_cut=result.get("finish_reason") == "length",
            )
        )
    return answers


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or () if isinstance(part, dict))


def _read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """``config.yaml`` as it stands; empty while it is not there."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{folder / 'config.yaml'} cannot be read: {error}")
        return {}
    return config if isinstance(config, dict) else {}


def checkpoint_of(outcome: Outcome, *, best: bool) -> Path | None:
    """The checkpoint to go on with: ``best`` where asked and marked, else ``last``; None without any."""
    if outcome.run_dir is None:
        return None
    folder = RunFolder(Path(outcome.run_dir))
    for kind in ("best", "last") if best else ("last",):
        if folder.marked(kind) is not None:
            return folder.path / kind
    return folder.latest_checkpoint()
