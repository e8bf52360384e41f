"""Loss, token accuracy and perplexity on validation data, during training and on demand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from swift.data.batching import BatchSchedule
from swift.data.loader import BatchLoader
from swift.data.tokens import TokenDataset
from swift.objectives.base import Objective
from swift.parallel.engine import Engine
from swift.parallel.world import World
from swift.train.state import LogWindow

__all__ = ["Evaluator", "Evaluators", "LossEvaluator", "validation_loader"]


class Evaluator(Protocol):
    """What measures the model between steps."""

    num_batches: int

    def run(self, engine: Any, given_up: Callable[[], bool] = ...) -> dict[str, float] | None:
        """Metrics whose names begin with ``eval_``; None when ``given_up`` said so."""


class Evaluators:
    """Several, one after the other; their metrics together, their seconds added."""

    def __init__(self, parts: Sequence[Evaluator]) -> None:
        self.parts = parts
        self.num_batches = sum(part.num_batches for part in parts)

    def run(self, engine: Any, given_up: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """All metrics; None when ``given_up`` said so to one of them."""
        metrics: dict[str, float] = {"eval_seconds": 0.0}
        for part in self.parts:
            found = part.run(engine, given_up)
            if found is None:
                return None
            seconds = metrics.pop("eval_seconds") + found["eval_seconds"]
            metrics |= {**found, "eval_seconds": seconds}
        return metrics


def validation_loader(
    dataset: TokenDataset,
    *,
    batch_size: int,
    pad_token_id: int,
    group_by_length: bool,
    world: World | None = None,
) -> tuple[BatchLoader, int]:
    """Padded batches that hold every sample once, over all processes, and how many there are of ours.

    A step of the loader is one batch of ours.
    """
    schedule = BatchSchedule(
        dataset.lengths,
        batch_size=batch_size,
        mode="padded",
        group_by_length=group_by_length,
        shuffle=False,
        seed=0,
    )
    world = world or World()
    share = (world.data_rank, world.layout.dp)
    loader = BatchLoader(dataset, schedule, pad_token_id=pad_token_id, share=share)
    return loader, schedule.num_steps(world.layout.dp)


class LossEvaluator:
    """Evaluates an engine's model on one data set.

    Args:
        dataset: validation samples.
        batch_size: samples per batch (padded, grouped by length: every sample exactly once).
        objective: what is measured.
        group_names: of the groups whose sums the objective tells apart.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        pad_token_id: int,
        objective: Objective,
        group_names: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        self.objective, self.group_names, self.world = objective, group_names, world or World()
        self._loader, self.num_batches = validation_loader(
            dataset, batch_size=batch_size, pad_token_id=pad_token_id, group_by_length=True, world=self.world
        )

    def run(self, engine: Engine, given_up: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Keys: eval_loss (mean per target weight), eval_token_accuracy, eval_perplexity, eval_seconds; with groups
        eval_loss_GROUP.

        ``given_up`` is asked before each batch; when it says so, there is no result.
        """
        started = time.perf_counter()
        loss = weight = correct = targets = 0.0
        groups = torch.zeros(2, len(self.group_names), dtype=torch.float64)
        for (batch,) in self._loader.steps(0, self.world.layout.dp):
            if given_up():
                return None
            output = engine.evaluate(batch, self.objective)
            loss += float(output.metrics["loss_sum"])
            correct += float(output.metrics["num_correct"])
            weight += self.objective.denominators([batch]).target_weight
            targets += batch.num_targets
            if "groups" in output.metrics:
                groups += output.metrics["groups"].cpu()
        sums = self.world.sums([loss, weight, correct, targets, *groups.flatten().tolist()])
        loss, weight, correct, targets = sums[:4]
        window = LogWindow()
        window.add_groups(self.group_names, [sums[4 : 4 + groups.shape[1]], sums[4 + groups.shape[1] :]])
        mean = loss / weight if weight else float("nan")
        return {
            "eval_loss": mean,
            "eval_token_accuracy": correct / targets if targets else float("nan"),
            "eval_perplexity": math.exp(mean) if mean < 700 else float("inf"),
            **{f"eval_{name}": value for name, value in window.group_losses.items()},
            "eval_seconds": time.perf_counter() - started,
        }
