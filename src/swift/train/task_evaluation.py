"""Loss and metrics of tasks over whole sequences on validation data."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from swift.data.tokens import TokenDataset
from swift.objectives.pooled import PooledObjective
from swift.parallel.pooled import PooledEngine
from swift.parallel.world import World
from swift.train.evaluation import validation_loader

__all__ = ["TaskEvaluator"]


class TaskEvaluator:
    """Evaluates an engine's model on one data set; metrics are taken over all of it, not by batches.

    Args:
        dataset: validation samples, groups of sequences.
        batch_size: samples per batch. An in-batch loss is that of batches of this size, in the order of the data.
        objective: what is measured.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        pad_token_id: int,
        objective: PooledObjective,
        world: World | None = None,
    ) -> None:
        self.objective, self.world = objective, world or World()
        self._loader, self.num_batches = validation_loader(
            dataset, batch_size=batch_size, pad_token_id=pad_token_id, group_by_length=False, world=self.world
        )

    def run(
        self,
        engine: PooledEngine,
        given_up: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Keys: eval_loss (mean over its terms), the metrics of the loss, eval_seconds.

        ``given_up`` is asked before each batch; when it says so, there is no result.
        """
        started, objective = time.perf_counter(), self.objective
        loss = terms = 0.0
        values: list[Tensor] = []
        labels: list[Tensor] = []
        groups: list[int] = []
        for (batch,) in self._loader.steps(0, self.world.layout.dp):
            if given_up():
                return None
            outputs = engine.predict(batch)
            denominators = objective.denominators([batch])
            _, sums = objective(outputs, batch.to(outputs.values.device), denominators)
            assert batch.labels is not None and batch.groups is not None
            loss += float(sums["loss_sum"])
            terms += denominators.num_answers or 0
            values.append(outputs.values.cpu())
            labels.append(batch.labels)
            groups += batch.groups
        loss, terms = self.world.sums([loss, terms])
        found = self.world.collect((torch.cat(values), torch.cat(labels), groups))
        measured = objective.loss.measure(
            torch.cat([part[0] for part in found]),
            torch.cat([part[1] for part in found]),
            [size for part in found for size in part[2]],
        )
        return {
            "eval_loss": loss / terms if terms else float("nan"),
            **{f"eval_{name}": value for name, value in measured.items()},
            "eval_seconds": time.perf_counter() - started,
        }
