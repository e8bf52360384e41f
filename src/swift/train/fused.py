"""Several LoRA runs on one base model, step by step beside each other.

A member is an ordinary run: configuration, data and their order, folder, metrics, evaluation, checkpoints, stopping.
Only the gradients of its optimizer steps are computed together with those of the others (`swift.parallel.fused`).
Members join and leave between two steps; what ends one run (its last step, a signal, a loss that is not finite) ends no
other.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swift.config.schema import Resolved
from swift.core.logging import get_logger, keep_logs_apart
from swift.parallel.engine import StepOutput
from swift.parallel.fused import MemberStep, clear_gradients, fused_gradients
from swift.parallel.native import NativeEngine
from swift.train.failures import failure_kind
from swift.train.run import RunResult, run_steps
from swift.train.shared_base import SharedBase
from swift.train.signals import StopSignals
from swift.train.step import Step

__all__ = ["FusedGroup", "Member", "train_fused"]

logger = get_logger(__name__)


@dataclass
class Member:
    """One run of a group.

    Attributes:
        name: for messages.
        signals: what stops it alone (``member.signals.receive(signal.SIGTERM)``): at the next step it saves itself.
        result: of a run that came to its end.
        error: what ended it otherwise.
    """

    name: str
    signals: StopSignals
    result: RunResult | None = None
    error: Exception | None = None
    _steps: Generator[Step, StepOutput, RunResult] | None = field(default=None, repr=False)
    _step: Step | None = field(default=None, repr=False)
    _adapter: str | None = field(default=None, repr=False)
    # Every run has a context of its own, which says where its log lines go.
    _context: contextvars.Context = field(default_factory=contextvars.copy_context, repr=False)

    @property
    def is_done(self) -> bool:
        return self._steps is None

    @property
    def exit_code(self) -> int:
        """That of the run as a process of its own."""
        return 0 if self.error is None else int(getattr(self.error, "exit_code", 1))


class FusedGroup:
    """Runs on one base model.

    Args:
        say: receives the few lines meant for the terminal.
        signals: those of the process; a signal stops every member.
        on_done: called with every member that ends, in whatever way.
        gradients: computes the steps of several members together.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] = print,
        signals: StopSignals | None = None,
        on_done: Callable[[Member], None] = lambda member: None,
        gradients: Callable[..., list[StepOutput]] = fused_gradients,
    ) -> None:
        self.base = SharedBase()
        self.members: list[Member] = []
        self.largest: int | None = None
        self._say, self._on_done, self._gradients = say, on_done, gradients
        self._signals = signals or StopSignals()
        self._counter = 0

    def join(self, resolved: Resolved, name: str = "", **options: Any) -> Member:
        """Let a run take part from the next step on. What is wrong with it is its own ``error``, not the group's.

        ``options``: those of `swift.train.run.train`.
        """
        self._counter += 1
        name = name or resolved.config.checkpoint.run_name or f"run {self._counter}"
        member = Member(name, StopSignals(self._signals))
        member._context.run(keep_logs_apart)
        options.setdefault("say", lambda text: self._say(f"{member.name}: {text}"))
        member._steps = run_steps(resolved, base=self.base, signals=member.signals, **options)
        self.members.append(member)
        self._advance(member, member._steps.__next__)
        return member

    def step(self) -> None:
        """One optimizer step of every member."""
        pending = [(member, _asked(member)) for member in self.members]
        for start in range(0, len(pending), self.largest or len(pending) or 1):
            self._compute(pending[start : start + (self.largest or len(pending))])

    def run(self) -> None:
        """Step until no member is left."""
        with self._signals:
            while self.members:
                self.step()

    def close(self) -> None:
        """End what is left without a word; after an error that belongs to no member."""
        for member in list(self.members):
            if member._steps is not None:
                self._context_run(member, member._steps.close)
            self._leave(member)

    def _compute(self, parts: list[tuple[Member, MemberStep]]) -> None:
        """Gradients of these members, then what each of them does with its own. Out of memory: half of them at a time.

        A group that does not fit goes on in smaller ones, from the same step; a member that does not fit alone fails.
        """
        steps = [step for _, step in parts]
        try:
            outputs = self._gradients(steps, self.base.switch)
        except Exception as error:  # of a member alone, it ends that run and no other
            if steps[0].engine.ranks is not None:  # other processes know nothing of it, and wait
                raise
            clear_gradients(steps)
            self._recover(parts, error)
            return
        for (member, _), output in zip(parts, outputs, strict=True):
            assert member._steps is not None
            self._advance(member, member._steps.send, output)

    def _recover(self, parts: list[tuple[Member, MemberStep]], error: Exception) -> None:
        """Nothing has changed but gradients, which are cleared: the step begins again with fewer at a time."""
        _release_memory()
        if len(parts) == 1:
            member = parts[0][0]
            assert member._steps is not None
            self._advance(member, member._steps.throw, error)
        elif failure_kind(error) == "out_of_memory":
            self.largest = half = (len(parts) + 1) // 2
            self._say(f"{len(parts)} runs do not fit into memory together: now {half} at a time")
            self._compute(parts[:half])
            self._compute(parts[half:])
        else:  # whose fault it is shows when each is computed alone
            logger.warning("a fused step failed, its members are computed one by one", exc_info=error)
            for part in parts:
                self._compute([part])
            if not any(member.error for member, _ in parts):
                self.largest = 1
                self._say(f"these runs cannot be computed together ({error}): one after another from here")

    def _advance(self, member: Member, function: Callable[..., Step], *arguments: Any) -> None:
        """Let a member go on to its next step."""
        try:
            if self.base.model is not None and member._adapter is not None:
                with self.base.switch.use(member._adapter):
                    member._step = self._context_run(member, function, *arguments)
            else:
                member._step = self._context_run(member, function, *arguments)
                member._adapter = self.base.switch.active
        except StopIteration as end:
            member.result = end.value
            self._leave(member)
        except Exception as error:
            member.error = error.with_traceback(None)  # which would keep the run's memory; it is in its log
            self._leave(member)

    @staticmethod
    def _context_run(member: Member, function: Callable[..., Any], *arguments: Any) -> Any:
        return member._context.run(function, *arguments)

    def _leave(self, member: Member) -> None:
        member._steps = member._step = None
        if member in self.members:
            self.members.remove(member)
            self._on_done(member)


def _asked(member: Member) -> MemberStep:
    step = member._step
    assert step is not None and member._adapter is not None and isinstance(step.engine, NativeEngine)
    return MemberStep(member._adapter, step.engine, step.batches, step.objective, step.seed)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_fused(
    configs: Sequence[Resolved],
    *,
    say: Callable[[str], None] = print,
    options: Sequence[dict[str, Any]] | None = None,
    on_done: Callable[[Member], None] = lambda member: None,
) -> list[Member]:
    """Run several configurations on one base model; every one leaves what it would leave alone.

    Args:
        configs: runs that differ in data, adapter and optimization (`swift.config.fusing`).
        options: for each run, those of `swift.train.run.train`.
        on_done: called with every member that ends.

    Returns the members in order. What ended a run is its ``error``; the others go on.
    """
    group = FusedGroup(say=say, on_done=on_done)
    with contextlib.closing(group):
        members = [
            group.join(resolved, **one)
            for resolved, one in zip(configs, options or [{} for _ in configs], strict=True)
        ]
        group.run()
    return members
