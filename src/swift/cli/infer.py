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
    from swift.inference.generate import Generator


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
    from swift.data.hub import pin_datasets
    from swift.data.persona import dataset_specs
    from swift.evaluate.answers import answer_limit, answer_questions, read_questions, summarize
    from swift.evaluate.results import write_metrics
    from swift.inference.context import find_context

    data, options = resolved.config.data, resolved.config.generation
    pin_datasets(resolved)
    context = find_context(resolved)
    _say_note(context)
    questions = read_questions(dataset_specs(data, data.val_dataset), data.columns, data.on_bad_rows)
    path = _result_path(resolved, context)
    generator = _generator(resolved, context)
    if context.run is not None and not resolved.is_explicit("max_new_tokens"):
        limit = answer_limit(questions.good, generator.tokenizer, options.max_new_tokens)
        options = options.model_copy(update={"max_new_tokens": limit})
    seed = resolved.config.training.seed if options.temperature > 0 else None
    identity = [str(folder.resolve()) for folder in (context.model, context.adapter) if folder is not None]
    with _Progress(len(questions.good), path) as progress:
        results = answer_questions(
            generator,
            questions.good,
            options,
            path,
            identity=identity,
            seed=seed,
            on_progress=progress.update,
        )
    summary: dict[str, Any] = {**summarize(results), "max_new_tokens": options.max_new_tokens}
    if questions.bad:
        summary["num_bad_rows"] = len(questions.bad)
        print(f"{len(questions.bad)} bad rows left out; the first: {questions.bad[0]}")
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


def _generator(resolved: Resolved, context: InferenceContext) -> Generator:
    import torch

    from swift.inference.context import load_context
    from swift.inference.generate import Generator

    if resolved.config.training.num_threads is not None:
        torch.set_num_threads(resolved.config.training.num_threads)
    return Generator(load_context(context, resolved))


def _chat(resolved: Resolved) -> None:
    from swift.inference.context import find_context

    context = find_context(resolved)
    _say_note(context)
    generator = _generator(resolved, context)

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


class _Progress:
    """A progress line on a terminal, nothing elsewhere; on Ctrl-C it says how to go on."""

    def __init__(self, total: int, path: Path) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("answering", total=total)
        self._path = path

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            print(f"stopped; the same command with --result_path {self._path} goes on", file=sys.stderr)


def _print_summary(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        print(f"{name:15} {value:.4f}" if isinstance(value, float) else f"{name:15} {value}")
