"""``swift infer``: chat with a model, or answer the rows of a file."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.bind import resolve
from swift.config.schema import Resolved

if TYPE_CHECKING:
    from swift.inference.context import InferenceContext


def run(argv: list[str]) -> int:
    """Batch with ``--val_dataset``, conversation on a terminal, else one answer for each line of the input."""
    resolved = resolve("infer", argv)
    if resolved.config.data.val_dataset:
        infer(resolved)
    else:
        _chat(resolved)
    return 0


def infer(resolved: Resolved) -> dict[str, Any]:
    """Batch inference over ``val_dataset``; returns the summary, with the result file under ``result_path``.

    The summary is also written beside the result file (``answers.jsonl`` -> ``answers.json``).

    Raises:
        SwiftError: model, adapter, data or result file cannot be used; data and result file are looked at before
            the model is loaded.
    """
    from swift.cli.progress import AnswerProgress
    from swift.evaluate.answers import answer_tasks, summarize
    from swift.evaluate.evaluation import identity_of, limited, load_generator
    from swift.evaluate.results import write_metrics
    from swift.evaluate.subjects import LocalModel
    from swift.evaluate.suite import read_tasks, task_specs
    from swift.inference.context import find_context

    options = resolved.config.generation
    context = find_context(resolved)
    _say_note(context)
    (task,) = read_tasks(resolved, task_specs(resolved), answers=True)
    path = _result_path(resolved, context)
    generator = load_generator(resolved, context)
    if context.run is not None and not task.fixed_length:
        limited(task, generator.tokenizer)
    seed = resolved.config.training.seed if options.temperature > 0 else None
    subject = LocalModel(generator, identity_of(context), options.max_batch_size)
    go_on = f"the same command with --result_path {path} goes on"
    with AnswerProgress(go_on, len(task.questions.good)) as progress:
        results = answer_tasks(subject, [task], path, seed=seed, on_progress=progress.update)
    summary: dict[str, Any] = {
        **summarize(results, task.evaluators), "max_new_tokens": task.options.max_new_tokens
    }  # fmt: skip
    bad = task.questions.bad
    if bad:
        summary["num_bad_rows"] = len(bad)
        print(f"{len(bad)} bad rows left out; the first: {bad[0]}")
    summary["result_path"] = str(path)
    write_metrics(path, summary)
    _print_summary(summary)
    return summary


def _say_note(context: InferenceContext) -> None:
    note = context.note()
    if note:
        print(note, file=sys.stderr)


def _result_path(resolved: Resolved, context: InferenceContext) -> Path:
    given = resolved.config.generation.result_path
    if given is not None:
        return Path(given).expanduser()
    name = f"infer-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    return context.run / name if context.run is not None else context.home.resolve().parent / name


def _chat(resolved: Resolved) -> None:
    from swift.evaluate.evaluation import load_generator
    from swift.inference.context import find_context

    context = find_context(resolved)
    _say_note(context)
    generator = load_generator(resolved, context)

    from swift.inference.chat import Chat, answer_lines, read_input

    chat = Chat(generator, resolved.config.generation, seed=resolved.config.training.seed)
    if not sys.stdin.isatty():
        answer_lines(chat, iter(sys.stdin))
        return
    with contextlib.suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # gives input() line editing and history
    print(f"{context.describe()}. /help lists the commands.")
    interrupted = False  # a Ctrl-C that comes just after the end of an answer should not end the chat
    while True:
        try:
            text = read_input(input)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                print()
                return
            interrupted = True
            print("\n(Ctrl-C again or /exit leaves)")
            continue
        interrupted = False
        if not chat.handle(text):
            return


def _print_summary(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        print(f"{name:15} {value:.4f}" if isinstance(value, float) else f"{name:15} {value}")
