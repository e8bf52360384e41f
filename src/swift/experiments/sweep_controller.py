"""A search that learns from its trials: Optuna proposes values and gives up trials that fall behind.

What was asked, reported and finished is appended to ``trials.jsonl`` in the controller's folder before anybody acts on
it. A controller that starts again plays that file back, and is then in the same state: Optuna's own storages are not
needed, nothing holds a lock that a kill would leave behind, and the values depend on the seed and the results alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swift.core.errors import SwiftError
from swift.core.files import atomic_write_json, read_json
from swift.evaluate.results import RESULTS
from swift.experiments.expand import trial_specs
from swift.experiments.file import ExperimentFile, parse_experiments
from swift.experiments.outcome import RESULT_FOLDER
from swift.experiments.search_space import Parameter, Sweep, candidates
from swift.experiments.types import JobSpec
from swift.runs.metrics import MetricsLog, read_metrics

if TYPE_CHECKING:
    import optuna

__all__ = ["SweepController", "metric_of"]

_LOG = "trials.jsonl"
_SETUP = "sweep.json"


class SweepController:
    """The trials of one sweep, in one folder that it alone writes.

    The service asks for jobs (``next_specs``), tells what their metrics say (``report``) and how they ended
    (``finish``). Trials go by the name of their experiment (``trial-03``).

    Args:
        file: a file whose ``sweep.is_controlled``.
        folder: where it keeps ``sweep.json`` (the file and ``cwd``, so that ``open`` needs nothing else) and
            ``trials.jsonl``.
        cwd: what relative paths in the file are relative to.

    Raises SwiftError when Optuna is missing, or when the folder belongs to another sweep.
    """

    def __init__(self, file: ExperimentFile, folder: Path, cwd: str | Path) -> None:
        if file.sweep is None:
            raise ValueError("the file has no sweep")
        _import_optuna()
        self.file = file
        self.sweep: Sweep = file.sweep
        self.folder = folder
        self.cwd = str(Path(cwd).absolute())
        folder.mkdir(parents=True, exist_ok=True)
        setup = {"shown": file.shown, "text": file.text, "cwd": self.cwd}
        if (folder / _SETUP).exists():
            if json.loads((folder / _SETUP).read_text(encoding="utf-8")) != setup:
                raise SwiftError("this folder belongs to another sweep", where=str(folder))
        else:
            atomic_write_json(folder / _SETUP, setup)
        self._study = _make_study(self.sweep)
        self._points = [] if self.sweep.method == "tpe" else list(candidates(self.sweep))
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._reported: dict[int, set[int]] = {}
        self._results: dict[int, dict[str, Any]] = {}
        history = read_metrics(folder / _LOG)
        self._log = MetricsLog(folder / _LOG)
        for event in history:
            self._play(event)

    @classmethod
    def open(cls, folder: Path) -> SweepController:
        """The controller of a folder, as it was when its process ended."""
        setup = json.loads((folder / _SETUP).read_text(encoding="utf-8"))
        return cls(parse_experiments(setup["text"], setup["shown"]), folder, setup["cwd"])

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._log.close()

    @property
    def done(self) -> bool:
        """True when every trial has ended."""
        return len(self._results) == self.sweep.trials

    @property
    def running(self) -> list[str]:
        """Experiments that were asked for and have not ended."""
        return [self.sweep.trial_name(number) for number in self._trials if number not in self._results]

    @property
    def limit(self) -> int:
        """Trials at a time."""
        return self.sweep.limit(self.file.resources.max_parallel)

    def judge_of(self, experiment: str) -> str:
        """The job whose end settles the trial: its training, or its evaluation when the metric comes from there."""
        return experiment if _is_training_metric(self.sweep.metric) else f"{experiment}/evaluate"

    def next_specs(self, room: int, known: Collection[str] = ()) -> list[JobSpec]:
        """The jobs of up to ``room`` more trials, stages included; fewer when ``limit`` or ``trials`` says so.

        ``known``: experiments that already have their jobs. Trials that were asked for, but whose jobs were lost with
        the process that should have stored them, are given again first, outside ``room``.
        """
        lost = [name for name in self.running if name not in known]
        numbers = [number for number in self._trials if self.sweep.trial_name(number) in lost]
        free = min(room, self.limit - len(self.running), self.sweep.trials - len(self._trials))
        for _ in range(max(0, free)):
            number = len(self._trials)
            values = self._ask(number, None)
            self._log.append({"event": "ask", "trial": number, "values": values})
            numbers.append(number)
        return trial_specs(self.file, self.cwd, {number: self._values(number) for number in numbers})

    def report(self, experiment: str, step: int, value: float | None) -> Literal["continue", "stop"]:
        """A metric of a running trial at a step; whether the trial should go on. Steps may come twice."""
        number = self._number(experiment)
        if number in self._results:
            return "stop"
        if value is None or not math.isfinite(value) or step in self._reported.get(number, set()):
            return "continue"
        event = {"event": "report", "trial": number, "step": step, "value": value}
        self._log.append(event)
        self._play(event)
        return "stop" if self.should_stop(experiment) else "continue"

    def should_stop(self, experiment: str) -> bool:
        """Whether the trial has fallen behind the others, by what was reported so far."""
        if self.sweep.early_stop is None:
            return False
        return self._trials[self._number(experiment)].should_prune()

    def finish(
        self,
        experiment: str,
        value: float | None,
        state: Literal["succeeded", "failed", "stopped"] = "succeeded",
    ) -> None:
        """The end of a trial; a second call for it does nothing.

        Args:
            value: the metric; None when it is not known, which counts as failed.
            state: ``stopped``: given up early after ``report`` said so.
        """
        number = self._number(experiment)
        if number in self._results:
            return
        value = value if value is not None and math.isfinite(value) else None
        if value is None and state == "succeeded":
            state = "failed"
        event = {"event": "finish", "trial": number, "value": value, "state": state}
        self._log.append(event)
        self._play(event)

    def results(self) -> list[dict[str, Any]]:
        """Every trial so far: experiment, values, state (running too), metric value."""
        rows = []
        for number in self._trials:
            result = self._results.get(number, {"state": "running", "value": None})
            row = {"experiment": self.sweep.trial_name(number), "values": self._values(number)}
            rows.append({**row, "state": result["state"], "value": result["value"]})
        return rows

    def _number(self, experiment: str) -> int:
        for number in self._trials:
            if self.sweep.trial_name(number) == experiment:
                return number
        raise KeyError(f"{experiment} is no trial of this sweep")

    def _values(self, number: int) -> dict[str, Any]:
        values = self._trials[number].params
        return {
            parameter.name: json.loads(values[parameter.name])
            if parameter.choices is not None
            else values[parameter.name]
            for parameter in self.sweep.parameters
        }

    def _play(self, event: dict[str, Any]) -> None:
        """Change the state as an event says: one of now, or one of the log."""
        number = event["trial"]
        if event["event"] == "ask":
            self._ask(number, event["values"])
        elif event["event"] == "report":
            self._trials[number].report(event["value"], event["step"])
            self._reported.setdefault(number, set()).add(event["step"])
        else:
            self._results[number] = {"state": event["state"], "value": event["value"]}
            self._tell(number, event["state"], event["value"])

    def _ask(self, number: int, recorded: dict[str, Any] | None) -> dict[str, Any]:
        """Open trial ``number`` in the study: with recorded values, the next point, or what TPE proposes."""
        optuna = _import_optuna()
        values = recorded if recorded is not None else self._points[number] if self._points else None
        if values is not None:
            encoded = {
                parameter.name: _encoded(parameter, values[parameter.name])
                for parameter in self.sweep.parameters
            }
            self._study.enqueue_trial(encoded)
        else:
            # A sampler of its own for each trial: after a restart the next proposal is the one it would have been.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=self.sweep.seed * 1_000_003 + number, constant_liar=self.limit > 1
            )
        trial = self._study.ask()
        for parameter in self.sweep.parameters:
            _suggest(trial, parameter)
        self._trials[number] = trial
        return self._values(number)

    def _tell(self, number: int, state: str, value: float | None) -> None:
        states = _import_optuna().trial.TrialState
        trial = self._trials[number]
        if state == "succeeded" and value is not None:
            self._study.tell(trial, value)
        else:
            # Optuna learns from given-up trials through what they reported.
            self._study.tell(trial, state=states.PRUNED if state == "stopped" else states.FAIL)


def metric_of(run_dir: str | Path, metric: str) -> float | None:
    """The value that judges a trial: the last in the run's metrics, or that of its evaluation.

    None when it is not there (yet), or not finite.
    """
    folder = Path(run_dir)
    if _is_training_metric(metric):
        values = [
            row.get(metric)
            for row in read_metrics(folder / "metrics.jsonl")
            if row.get(metric) is not None or metric in row.get("nonfinite", {})
        ]
        value = values[-1] if values else None
    else:
        results = read_json(folder / RESULT_FOLDER / RESULTS)
        value = results.get("metrics", {}).get(metric.removeprefix("evaluation."))
    return float(value) if value is not None and math.isfinite(value) else None


def _is_training_metric(metric: str) -> bool:
    return metric == "loss" or metric.startswith("eval_")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SwiftError(
            "this sweep needs Optuna",
            why="grid and random without early_stop need nothing more",
            fix='pip install "swift-forge[sweep]"',
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _make_study(sweep: Sweep) -> optuna.study.Study:
    optuna = _import_optuna()
    return optuna.create_study(
        direction="minimize" if sweep.minimize else "maximize",
        sampler=optuna.samplers.RandomSampler(seed=sweep.seed),
        pruner=_make_pruner(sweep),
    )


def _make_pruner(sweep: Sweep) -> Any:
    pruners = _import_optuna().pruners
    early = sweep.early_stop
    if early is None:
        return pruners.NopPruner()
    settings = early.settings
    if early.method == "median":
        return pruners.MedianPruner(
            n_startup_trials=settings.get("startup_trials", 3), n_warmup_steps=settings.get("warmup_steps", 0)
        )
    factor = settings.get("reduction_factor", 3)
    if early.method == "asha":
        return pruners.SuccessiveHalvingPruner(
            min_resource=settings.get("min_steps", "auto"), reduction_factor=factor
        )
    return pruners.HyperbandPruner(
        min_resource=settings.get("min_steps", 1), max_resource=settings["max_steps"], reduction_factor=factor
    )


def _suggest(trial: optuna.trial.Trial, parameter: Parameter) -> None:
    name, low = parameter.name, parameter.low
    # Optuna wants the range to end on a step.
    high = parameter.grid()[-1] if parameter.step is not None else parameter.high
    if parameter.choices is not None:
        trial.suggest_categorical(name, [_encoded(parameter, choice) for choice in parameter.choices])
    elif parameter.integer:
        trial.suggest_int(name, int(low), int(high), step=int(parameter.step or 1), log=parameter.log)
    else:
        trial.suggest_float(name, low, high, step=parameter.step, log=parameter.log)


def _encoded(parameter: Parameter, value: Any) -> Any:
    """Optuna's categories are scalars; lists and the rest travel as JSON."""
    return json.dumps(value, ensure_ascii=False) if parameter.choices is not None else value
