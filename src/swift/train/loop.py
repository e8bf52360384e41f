"""The training loop.

One step: seed, gradients of all micro-batches, clip, update. Everything else (metric lines, evaluation,
checkpoints, stopping) happens between steps, so a run can end and go on at any step boundary.

The loop is a generator that asks for the gradients of its next step: a run alone has its engine answer
(`swift.train.step.drive`), several runs on one base have theirs computed together (`swift.train.fused`).
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from swift.config.schema import Resolved
from swift.core.devices import memory_in_use, peak_memory
from swift.core.errors import SwiftError
from swift.core.logging import get_logger, set_log_step
from swift.data.collate import Batch
from swift.data.loader import BatchLoader
from swift.data.report import StreamReport
from swift.data.stream import StreamLoader
from swift.objectives.base import Objective
from swift.parallel.engine import Engine, StepOutput, count_step
from swift.parallel.world import World
from swift.runs.folder import RunFolder
from swift.runs.metrics import MetricsLog, last_evaluation
from swift.runs.status import StatusFile
from swift.train.callbacks.base import Callback
from swift.train.checkpoints import PendingSave
from swift.train.clock import Clock
from swift.train.evaluation import Evaluator
from swift.train.failures import NonFiniteError
from swift.train.seeds import derived_seed, seed_everything
from swift.train.signals import StopSignals
from swift.train.state import LogWindow, TrainState
from swift.train.step import Step, drive

__all__ = ["Interrupted", "PolicyLoader", "StepPlan", "Trainer"]

logger = get_logger(__name__)

STATUS_INTERVAL_SECONDS = 1.0


class Interrupted(SwiftError):
    """The run was asked to stop and saved itself; ``exit_code`` is 128 + signal number."""

    def __init__(self, message: str, *, fix: str, signal_number: int) -> None:
        super().__init__(message, fix=fix)
        self.exit_code = 128 + signal_number


@dataclass(frozen=True)
class StepPlan:
    """How long the run is: optimizer steps in all and per epoch (None: of a stream), micro-batches per step, over all
    processes."""

    total_steps: int
    steps_per_epoch: int | None
    accumulation: int


class PolicyLoader(Protocol):
    """Serves the micro-batches of each step, as `BatchLoader` does; it samples them with the weights as they are."""

    def steps(self, epoch: int, accumulation: int, start_step: int = 0) -> Iterator[list[Any]]: ...
    def close(self) -> None: ...


@dataclass
class _PendingStep:
    """Results of a step that still lie on the device, so that the loop need not wait for it."""

    step: int
    loss_sum: Tensor
    num_correct: Tensor
    grad_norm: Tensor
    target_weight: float
    num_targets: int
    groups: Tensor | None = None


class Trainer:
    """Runs an objective over batches on an engine.

    Args:
        save: begins a checkpoint of the given state at the given path.
        evaluator: None when nothing is evaluated.
        group_names: of the groups whose sums the objective tells apart.
        metrics: opened and already cut back to ``state.step``.
    """

    def __init__(
        self,
        *,
        resolved: Resolved,
        folder: RunFolder,
        engine: Engine,
        objective: Objective,
        loader: BatchLoader | StreamLoader | PolicyLoader,
        plan: StepPlan,
        state: TrainState,
        save: Callable[[Path, TrainState], PendingSave],
        metrics: MetricsLog,
        status: StatusFile,
        device: torch.device,
        evaluator: Evaluator | None = None,
        group_names: Sequence[str] = (),
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
    ) -> None:
        self.resolved = resolved
        self.config = resolved.config
        self.folder = folder
        self.engine = engine
        self.objective = objective
        self.loader = loader
        self.plan = plan
        self.total_steps = plan.total_steps
        self.state = state
        self.evaluator, self.group_names = evaluator, group_names
        self.callbacks = callbacks
        self._save_checkpoint = save
        self._metrics = metrics
        self._status = status
        self._device = device
        self._pending: list[_PendingStep] = []
        self._stop_reason: str | None = None
        self._saved_step = state.step if state.step else None
        self._saving: tuple[PendingSave, int, bool] | None = None
        self._last_eval = last_evaluation(metrics.path)
        self._rates: dict[str, float] = {}
        self._clock = Clock()
        self._status_written = 0.0
        self.world = world or World()
        self._stop_asked: str | None = None
        self._signalled = False
        self.signals = StopSignals()

    def stop(self, reason: str) -> None:
        """Ask the run to end after the current step."""
        self._stop_asked = self._stop_asked or reason
        if self.world.size == 1:
            self._stop_reason = self._stop_asked

    def _agree(self) -> None:
        """Whether to stop, because of a signal or a callback of any process: all have to do it after the same step."""
        if self.world.size == 1:
            return
        asked = self._stop_asked is not None
        number = self.world.largest(1000 * asked + (self.signals.received or 0))
        if number % 1000:
            self.signals.receive(number % 1000)
        if number >= 1000:
            self._stop_reason = self._stop_asked or "another process asked for it"
        self._signalled = number % 1000 != 0

    @property
    def _must_stop(self) -> bool:
        """Whether a signal has come; of several processes, one that all know of."""
        return self.signals.received is not None if self.world.size == 1 else self._signalled

    def train(self) -> dict[str, Any]:
        """`steps`, computed by this run's own engine."""
        return drive(self.steps())

    def steps(self) -> Generator[Step, StepOutput, dict[str, Any]]:
        """Run until the planned end, a stop request or a signal; returns the summary.

        Yields every optimizer step and is sent what came of it, the gradients being in place by then.

        Raises:
            Interrupted: a signal ended the run; a checkpoint was saved.
            SwiftError: the loss is not finite, a checkpoint cannot be written, data does not arrive.
        """
        self._notify("on_train_begin")
        self._status.update("running", step=self.state.step, total_steps=self.total_steps, stage="train")
        self._clock.restart()
        with self.signals:
            if self.state.evaluation_owed:
                self._evaluate_and_save()
            for batches in self._remaining_steps():
                seed = self.config.training.seed
                share = (self.world.data_rank,) if self.world.data_rank else ()
                seed_everything(seed, "step", self.state.step, *share)
                noise = derived_seed(seed, "noise", self.state.step)
                self._update(batches, (yield Step(self.engine, batches, self.objective, noise)))
                if self._saving is not None and self._saving[0].is_written:
                    self._finish_saving()
                self._notify("on_step_end")
                self._agree()
                self._report_step()
                self._evaluate_and_save()
                if self._stop_reason:
                    break
            if self._pending or self.state.window.num_targets:
                self._log()  # steps after the last line, when something between the steps ended the run
            if self._saved_step != self.state.step:
                self._save()
            self._finish_saving()
        self.world.wait()
        return self._summary()

    def _remaining_steps(self) -> Iterator[list[Batch]]:
        """The batches of every step that is still to do; keeps the data cursor of the state."""
        state = self.state
        while state.step < self.total_steps:
            for batches in self._steps_of_epoch():
                yield batches
                if state.step >= self.total_steps:
                    return
            state.epoch += 1
            state.step_in_epoch = 0

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        state, loader = self.state, self.loader
        if not isinstance(loader, StreamLoader):
            yield from loader.steps(state.epoch, self.plan.accumulation, state.step_in_epoch)
            return
        for batches in loader.steps(
            state.epoch, self.plan.accumulation, state.step_in_epoch, state.position, state.stream_report
        ):
            # Saved after the step that these batches make.
            state.position, state.stream_report = loader.position, loader.report
            yield batches
        state.position, state.stream_report = (0, 0), loader.report

    def _update(self, batches: list[Batch], output: StepOutput) -> None:
        """Clip, update, count."""
        state, counts = self.state, output.counts or count_step(self.objective, batches)
        norm = self.engine.clip()["default"]
        self._rates = self.engine.step(state.step)
        state.step += 1
        state.step_in_epoch += 1
        state.num_tokens += counts.num_tokens
        self._clock.steps += 1
        self._clock.tokens += counts.num_tokens
        answers = counts.denominators.num_answers
        self._pending.append(
            _PendingStep(
                state.step,
                output.metrics["loss_sum"],
                output.metrics["num_correct"],
                norm,
                counts.denominators.target_weight,
                counts.num_targets if answers is None else answers,
                output.metrics.get("groups"),
            )
        )

    def _report_step(self) -> None:
        step = self.state.step
        set_log_step(step)
        finished = step >= self.total_steps or self._stop_reason is not None
        if step == 1 or step % self.config.report.logging_steps == 0 or finished:
            self._log()
        elif time.monotonic() - self._status_written > STATUS_INTERVAL_SECONDS:
            self._write_status()

    def _evaluate_and_save(self) -> None:
        """What is due after the step just done. A stop signal ends it, and the resumed run begins with it."""
        if self._must_stop:
            self._interrupt(owed=True)
        self.state.evaluation_owed = False
        improved = self._evaluate() if self._due(self.config.evaluation.eval_strategy, "eval") else False
        if self._due(self.config.checkpoint.save_strategy, "save") or improved:
            self._save(is_best=improved)
        if self._must_stop and self.state.step < self.total_steps:
            self._interrupt(owed=False)

    def _due(self, strategy: str | None, what: str) -> bool:
        """Whether an evaluation or a save belongs to the step just done."""
        step, state = self.state.step, self.state
        if what == "eval" and self.evaluator is None:
            return False
        if strategy == "steps":
            every = self.config.evaluation.eval_steps if what == "eval" else self.config.checkpoint.save_steps
            return step % (every or 1) == 0 or (what == "eval" and step >= self.total_steps)
        if strategy == "epoch":
            return state.step_in_epoch == self.plan.steps_per_epoch or step >= self.total_steps
        return False

    def _flush(self) -> float:
        """Fetch the pending results (one device sync) into the log window; returns the last gradient norm."""
        if not self._pending:
            return float("nan")
        values = torch.stack(
            [
                torch.stack([p.loss_sum.double(), p.num_correct.double(), p.grad_norm.double()])
                for p in self._pending
            ]
        ).tolist()
        values = self._over_all(values)
        window = self.state.window
        for pending, (loss_sum, num_correct, grad_norm) in zip(self._pending, values, strict=True):
            if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
                self._refuse_nonfinite(pending.step, loss_sum, grad_norm)
            window.loss_sum += loss_sum
            window.num_correct += num_correct
            window.loss_weight += pending.target_weight
            window.num_targets += pending.num_targets
            if pending.groups is not None:
                window.add_groups(self.group_names, pending.groups.tolist())
        self._pending.clear()
        return values[-1][2]

    def _over_all(self, values: list[list[float]]) -> list[list[float]]:
        """Losses, right answers and groups of the pending steps, of all processes; norms are the same on all."""
        if self.world.size == 1:
            return values
        flat = [value for loss_sum, num_correct, _ in values for value in (loss_sum, num_correct)]
        groups = [p.groups.double().cpu() for p in self._pending if p.groups is not None]
        sums = self.world.sums([*flat, *(value for group in groups for value in group.flatten().tolist())])
        place = len(flat)
        for pending in self._pending:
            if pending.groups is not None:
                size = pending.groups.numel()
                found = torch.tensor(sums[place : place + size], dtype=torch.float64)
                pending.groups, place = found.view(pending.groups.shape), place + size
        return [[sums[2 * at], sums[2 * at + 1], row[2]] for at, row in enumerate(values)]

    def _refuse_nonfinite(self, step: int, loss_sum: float, grad_norm: float) -> None:
        if self.config.model.torch_dtype == "float16" and math.isfinite(loss_sum):
            return  # the gradient scaler skips such a step by design
        what = "loss" if not math.isfinite(loss_sum) else "gradient norm"
        latest = self.folder.latest_checkpoint()
        raise NonFiniteError(
            f"the {what} is not finite at step {step}",
            where=str(self.folder.path),
            why="the learning rate is too high, the precision too low, or the data holds an extreme sample",
            fix="lower --learning_rate, or add --warmup_ratio 0.03"
            + (f"; the weights of {latest.name} are intact" if latest else ""),
        )

    def _log(self) -> None:
        grad_norm = self._flush()
        window, clock, state = self.state.window, self._clock, self.state
        seconds = clock.lap()
        state.seconds += seconds
        state.last_loss = window.loss
        if state.first_loss is None:
            state.first_loss = window.loss
        metrics = {
            "step": state.step,
            "epoch": round(self._epoch(), 4),
            "loss": window.loss,
            **window.group_losses,
            **({self.objective.accuracy: window.token_accuracy} if self.objective.accuracy else {}),
            "grad_norm": grad_norm,
            "learning_rate": self._rates["default"],
            "tokens_per_second": round(clock.tokens / seconds, 1) if seconds else None,
            "step_time": round(seconds / clock.steps, 5) if clock.steps else None,
            "num_tokens": state.num_tokens,
            "gpu_mem_usage": _gib(memory_in_use(self._device)),
            "cpu_seconds": round(time.process_time(), 3),
        }
        clock.restart()
        state.window = LogWindow()
        self._metrics.append(metrics)
        self._write_status()
        self._notify("on_log", metrics)

    def _evaluate(self) -> bool:
        """Evaluate; returns True when the deciding metric is the best so far."""
        assert self.evaluator is not None
        self._clock.pause()
        self._status.update(stage="evaluate")
        metrics = self.evaluator.run(self.engine, lambda: self.world.size == 1 and self._must_stop)
        if metrics is None:
            self._interrupt(owed=True)
        self._last_eval = metrics
        self._metrics.append({"step": self.state.step, "epoch": round(self._epoch(), 4), **metrics})
        self._notify("on_evaluate", metrics)
        improved = self._keep_best(metrics)
        self._agree()
        self._status.update(stage="train")
        self._clock.restart(keep_counts=True)
        return improved

    def _keep_best(self, metrics: dict[str, float]) -> bool:
        options, state = self.config.evaluation, self.state
        name = options.metric_for_best_model
        if name not in metrics:
            raise SwiftError(
                f"there is no metric {name!r}",
                where="--metric_for_best_model",
                why=f"known: {', '.join(metrics)}",
            )
        value, sign = metrics[name], 1.0 if options.greater_is_better else -1.0
        best = state.best_metric
        if not math.isfinite(value):  # a correlation with constant labels: neither better nor worse
            return False
        if best is None or not math.isfinite(best) or sign * value > sign * best:
            state.best_metric, state.best_step, state.stale_evaluations = value, state.step, 0
            return True
        state.stale_evaluations += 1
        if options.early_stop_interval and state.stale_evaluations >= options.early_stop_interval:
            self.stop(f"{name} did not improve in {state.stale_evaluations} evaluations")
        return False

    def _save(self, *, is_best: bool = False) -> None:
        self._flush()  # also refuses to save weights that a non-finite step has spoiled
        self._clock.pause()
        self._status.update("saving", stage="save")
        state = self.state
        path = self.folder.checkpoint_path(state.step)
        self._finish_saving()
        is_best = is_best or (state.best_step == state.step and self.evaluator is not None)
        self._saving = self._save_checkpoint(path, state), state.step, is_best
        self._saved_step = state.step
        if self.world.size == 1:
            self._finish_saving()
        self._status.update("running", stage="train")
        self._clock.restart(keep_counts=True)

    def _finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        if self._saving is None:
            return
        (saving, step, is_best), self._saving = self._saving, None
        saving.finish()
        self.folder.mark("last", step)
        if is_best:
            self.folder.mark("best", step)
        self.folder.prune(self.config.checkpoint.save_total_limit)
        logger.info("saved %s", saving.path.name)
        self._notify("on_save", saving.path)

    def _interrupt(self, *, owed: bool) -> NoReturn:
        """Save and leave at once; ``owed``: evaluation and save of this step are left to the resumed run."""
        signals = self.signals
        if self._saved_step != self.state.step:
            self.state.evaluation_owed = owed
            self._save()
        self._finish_saving()
        self._write_status()
        self.world.wait()
        raise Interrupted(
            f"stopped by {signals.name} after step {self.state.step} of {self.total_steps}; checkpoint saved",
            fix=f"swift resume {shlex.quote(str(self.folder.path))}",
            signal_number=signals.received or 0,
        )

    def _summary(self) -> dict[str, Any]:
        state = self.state
        last, best = self.folder.marked("last"), self.folder.marked("best")
        return {
            "steps": state.step,
            "epochs": round(self._epoch(), 4),
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "evaluation": self._last_eval or None,
            "best_metric": state.best_metric,
            "best_step": state.best_step,
            "num_tokens": state.num_tokens,
            **({"rows": StreamReport.from_dict(rows).summary()} if (rows := state.stream_report) else {}),
            "train_seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.num_tokens / state.seconds, 1) if state.seconds else None,
            "peak_memory_gib": _gib(peak_memory(self._device)),
            "stop_reason": self._stop_reason,
            "last_checkpoint": last.name if last else None,
            "best_checkpoint": best.name if best else None,
        }

    def _epoch(self) -> float:
        """Passes over the data. Of a stream, whose length nobody knows, those before the one that is under way."""
        if self.plan.steps_per_epoch is None:
            return self.state.epoch
        return self.state.epoch + self.state.step_in_epoch / self.plan.steps_per_epoch

    def _write_status(self) -> None:
        self._status_written = time.monotonic()
        self._status.update(step=self.state.step)

    def _notify(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 2**30, 3)
