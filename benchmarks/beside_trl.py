"""What ``dpo_vs_trl.py`` and ``grpo_vs_trl.py`` share: runs of both sides in turn, and the CPU time of their steps."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import HERE, Child, Mark, read_marks, run_child
from settings import RLHF_LEARNING_RATE, swift_words

WARM_UP_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured process; ``lines``: what it logged."""

    child: Child
    marks: list[Mark]
    lines: list[dict[str, Any]]

    @property
    def step_seconds(self) -> float:
        """CPU-seconds a step, of the process between the marks."""
        first = next(mark for mark in self.marks if mark.step == WARM_UP_STEPS)
        return (self.marks[-1].cpu_seconds - first.cpu_seconds) / (self.marks[-1].step - first.step)

    def logged(self, name: str) -> list[float]:
        """The values of one metric, in the order of the steps; both sides give it the same name."""
        return [line[name] for line in self.lines if name in line]


def run_trl(script: str, model: Path, data: Path, out: Path, steps: int) -> Run:
    words = [str(word) for word in (HERE / script, model, data, out, "--steps", steps)]
    child = run_child([sys.executable, *words], out.with_suffix(".log"))
    return Run(child, read_marks(out / "marks.jsonl"), json.loads((out / "lines.json").read_text()))


def run_swift(options: Mapping[str, Any], model: Path, data: Path, out: Path, steps: int) -> Run:
    common = {"learning_rate": RLHF_LEARNING_RATE, "logging_steps": 1}
    command = swift_words("rlhf", model, data, out, steps, **common, **options)
    child = run_child(command, out.with_suffix(".log"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Run(child, read_marks(out / "marks.jsonl"), lines)


def in_turn(
    script: str,
    options: Mapping[str, Any],
    model: Path,
    data: Path,
    folder: Path,
    *,
    rounds: int,
    steps: int,
    tell: Callable[[Run], str],
) -> dict[str, list[Run]]:
    """TRL's script, then ours with the options, again and again; ``tell`` says what came of a run."""
    folder.mkdir()
    runs: dict[str, list[Run]] = {"TRL": [], "swift": []}
    for number in range(rounds):
        for name, mine in runs.items():
            out = folder / f"{name}-{number}"
            if name == "TRL":
                run = run_trl(script, model, data, out, steps)
            else:
                run = run_swift(options, model, data, out, steps)
            mine.append(run)
            print(f"round {number + 1}: {name}: {tell(run)}", flush=True)
    return runs
