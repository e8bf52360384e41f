"""Tasks of a suite as an evaluation of the model in training: no second copy of it, no trace left in the training."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from swift.config.schema import Resolved
from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError
from swift.core.registry import suggest
from swift.evaluate.answers import Task, score_rows, summarize
from swift.evaluate.evaluation import limited
from swift.evaluate.subjects import LocalModel
from swift.evaluate.suite import metric_names, read_tasks, task_specs
from swift.models.facts import ModelFacts
from swift.models.load import ModelBundle

if TYPE_CHECKING:
    from swift.train.evaluation import Evaluator
    from swift.train.prepare import Prepared

__all__ = ["SuiteEvaluator", "suite_evaluators"]

_AT_ONCE = 16
_LATE_SECONDS = 24 * 3600.0
"""By how much a rank may be behind others: answers differ in length, and judges take their time."""

_COUNTS = ("num_rows", "num_references")


def suite_evaluators(resolved: Resolved) -> list[Callable[[Prepared], Evaluator]]:
    """What ``eval_tasks`` asks for; nothing without. Suite, data and metrics are read here, before the model is.

    Raises SwiftError for a suite that cannot be used, ConfigError when it has no ``metric_for_best_model``.
    """
    if resolved.config.evaluation.eval_tasks is None:
        return []
    specs = task_specs(resolved)
    tasks = read_tasks(resolved, specs)
    metric, known = resolved.config.evaluation.metric_for_best_model, metric_names(specs)
    is_own = metric.startswith(tuple(f"eval_{spec.name}_" for spec in specs))
    if is_own and metric not in known and all(".py" not in name for spec in specs for name in spec.metrics):
        raise ConfigError(
            f"the tasks have no metric {metric!r}",
            where="--metric_for_best_model",
            why=f"they have {', '.join(known)}",
            fix=suggest(metric, known),
        )
    return [lambda prepared: SuiteEvaluator(tasks, prepared)]


class _GivenUp(Exception):
    """The run wants to stop."""


class SuiteEvaluator:
    """Answers the tasks with the model in training; of several ranks each answers its share of the rows.

    Args:
        tasks: what is measured.
        prepared: template and options of the run.
    """

    num_batches = 0

    def __init__(self, tasks: Sequence[Task], prepared: Prepared) -> None:
        self.tasks, self.prepared = tasks, prepared
        config = prepared.resolved.config
        self._seed = config.training.seed
        for task in tasks:
            if not task.fixed_length:
                limited(task, prepared.template.tokenizer)
        self._limits = self._memory()

    def run(self, engine: Any, given_up: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Keys: eval_TASK_METRIC and eval_seconds. ``given_up`` is asked behind every few rows."""
        from swift.inference.generate import Generator

        started = time.perf_counter()
        metrics: dict[str, float] = {}
        try:
            with _randomness_kept(), engine.evaluating() as model:
                generator = Generator(self._bundle(model), options=self._limits)
                with contextlib.closing(generator.engine):
                    found = self.prepared.world.together(
                        lambda: [
                            self._rows(LocalModel(generator, []), task, given_up) for task in self.tasks
                        ],
                        stage="eval_tasks",
                        seconds=_LATE_SECONDS,
                    )
                    for number, task in enumerate(self.tasks):
                        rows = sorted((row for rank in found for row in rank[number]), key=lambda row: row[0])
                        summary = summarize([row for _, row in rows], task.evaluators)
                        metrics |= {
                            f"eval_{task.name}_{k}": v for k, v in summary.items() if k not in _COUNTS
                        }
        except _GivenUp:
            return None
        return {**metrics, "eval_seconds": time.perf_counter() - started}

    def _memory(self) -> EngineSection:
        """Limits of the engine: keys and values of a few answers at once, not all memory that training leaves."""
        template = self.prepared.template
        longest = max(
            len(template.encode_prompt(question.messages, question.tools)) + task.options.max_new_tokens
            for task in self.tasks
            for question in task.questions.good
        )
        return EngineSection(max_num_seqs=_AT_ONCE, max_cache_tokens=max(16, _AT_ONCE * (longest + 1)))

    def _rows(
        self, subject: LocalModel, task: Task, given_up: Callable[[], bool]
    ) -> list[tuple[int, dict[str, Any]]]:
        """(number, result) of this rank's rows."""
        rows: list[tuple[int, dict[str, Any]]] = []

        def keep(found: list[tuple[int, dict[str, Any]]]) -> None:
            rows.extend(found)
            if given_up():
                raise _GivenUp

        seed = self._seed if task.options.temperature > 0 else None
        world = self.prepared.world
        score_rows(subject, task, list(enumerate(task.questions.good))[world.rank :: world.size], seed, keep)
        return rows

    def _bundle(self, model: Any) -> ModelBundle:
        folder, template = self.prepared.model_path, self.prepared.template
        attention = model.config._attn_implementation
        return ModelBundle(model, template.tokenizer, template, ModelFacts.read(folder), folder, attention)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Whatever draws random numbers inside, the generators go on afterwards as if nothing had happened."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
