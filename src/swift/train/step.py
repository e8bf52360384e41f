"""What a run asks for: the gradients of its next optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from swift.data.collate import Batch
from swift.objectives.base import Objective
from swift.parallel.engine import Engine, StepOutput

__all__ = ["Step", "drive"]

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One optimizer step of a run whose gradients are asked for, and who can compute them."""

    engine: Engine
    batches: list[Batch]
    objective: Objective
    seed: int


def drive(steps: Generator[Step, StepOutput, T]) -> T:
    """Have every step computed by its own engine; returns what the generator returns."""
    with contextlib.closing(steps):
        try:
            step = next(steps)
            while True:
                try:
                    output = step.engine.forward_backward(step.batches, step.objective, step.seed)
                except BaseException as error:  # the run itself has to know why it ends
                    step = steps.throw(error)
                else:
                    step = steps.send(output)
        except StopIteration as end:
            result: T = end.value
            return result
