"""``swift pt``, ``sft`` and ``rlhf``, and what ``swift resume`` shares: plan card, progress line, end card."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from swift.config.bind import resolve
from swift.config.parallel_rules import processes_of_launcher
from swift.config.schema import Resolved
from swift.core.logging import quiet_libraries

__all__ = ["pt", "rlhf", "run_or_plan", "sft"]


def _run(command: str, argv: Sequence[str]) -> int:
    """Bind the words after ``swift COMMAND`` and train, or only plan with ``--dry_run``.

    Without a model but with ``--resume_from_checkpoint``, the options of that run are the starting point.
    """
    resolved = resolve(command, argv)
    if resolved.config.model.model is None and resolved.config.checkpoint.resume_from_checkpoint:
        from swift.train.preflight import find_checkpoint

        checkpoint = find_checkpoint(resolved)
        if checkpoint is not None:
            resolved = resolve(command, [str(checkpoint.parent / "config.yaml"), *argv])
    return run_or_plan(resolved, [command, *argv])


pt, sft, rlhf = (partial(_run, command) for command in ("pt", "sft", "rlhf"))


def run_or_plan(resolved: Resolved, words: Sequence[str]) -> int:
    """Train as resolved, or with ``--dry_run`` show what that would do."""
    if "dry_run" in resolved.switches:
        from swift.cli.plan import show_plan

        return show_plan(resolved, as_json="json" in resolved.switches)
    return _train(resolved, words)


def _train(resolved: Resolved, words: Sequence[str]) -> int:
    """Train, telling the terminal the plan, the progress and the result."""
    # Importing torch and transformers makes millions of objects that live for ever; looking through them for
    # garbage again and again costs half a second. `train.run` switches collection on before the first step.
    gc.disable()
    quiet_libraries()
    is_worker = processes_of_launcher() is not None
    if not is_worker:
        from swift.train.preflight import preflight

        preflight(resolved)
    if resolved.config.parallel.num_processes > 1 and not is_worker:
        from swift.parallel.launch import launch

        return launch(words, resolved.config.parallel)
    from swift.parallel.launch import as_worker
    from swift.rl.run import train
    from swift.train.callbacks.progress import ProgressLine

    with as_worker():
        result = train(
            resolved,
            callbacks=[ProgressLine()],
            arguments=["swift", *words],
            announce=partial(_announce, resolved),
        )
    if int(os.environ.get("RANK", "0")) and resolved.config.parallel.num_processes > 1:
        return 0  # rank 0 shows what came of it
    _remember_speed(resolved, result.summary)
    from swift.runs.cards import print_end_card

    print_end_card(result.folder, result.summary)
    return 0


def _remember_speed(resolved: Resolved, summary: dict[str, Any]) -> None:
    """What the run has taught about the next one like it."""
    from swift.plan.plan import remember_run

    if summary.get("tokens_per_second") and summary["steps"] > 1:
        remember_run(resolved, summary["tokens_per_second"])


def _announce(resolved: Resolved, lengths: Sequence[int]) -> None:
    """The plan card of a new run, from the tokenised data; a resumed one only repeats its warnings."""
    if resolved.config.checkpoint.resume_from_checkpoint is None:
        from swift.plan.plan import make_plan
        from swift.runs.cards import print_plan_card

        print_plan_card(make_plan(resolved, lengths).to_dict())
    else:
        for warning in resolved.warnings:
            print(f"warning: {warning}", file=sys.stderr)
