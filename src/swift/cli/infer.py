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
from swift.core.errors import ConfigError

if TYPE_CHECKING:
    from swift.inference.chat import Chat
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
    from swift.evaluate.results import write_metrics
    from swift.inference.context import find_context

    pin_datasets(resolved)
    context = find_context(resolved)
    _say_note(context)
    path = _result_path(resolved, context)
    identity = [str(folder.resolve()) for folder in (context.model, context.adapter) if folder is not None]
    work = _answer_rows if context.writes_text else _value_rows
    summary, bad = work(resolved, context, path, identity)
    if bad:
        summary["num_bad_rows"] = len(bad)
        print(f"{len(bad)} bad rows left out; the first: {bad[0]}")
    summary["result_path"] = str(path)
    write_metrics(path, summary)
    _print_summary(summary)
    return summary


def _answer_rows(
    resolved: Resolved, context: InferenceContext, path: Path, identity: list[str]
) -> tuple[dict[str, Any], list[str]]:
    from swift.data.persona import dataset_specs
    from swift.evaluate.answers import answer_limit, answer_questions, read_questions, summarize

    data, options = resolved.config.data, resolved.config.generation
    questions = read_questions(dataset_specs(data, data.val_dataset), data.columns, data.on_bad_rows)
    generator = _generator(resolved, context)
    if context.run is not None and not resolved.is_explicit("max_new_tokens"):
        limit = answer_limit(questions.good, generator.tokenizer, options.max_new_tokens)
        options = options.model_copy(update={"max_new_tokens": limit})
    seed = resolved.config.training.seed if options.temperature > 0 else None
    try:
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
    finally:
        generator.engine.close()
    return {**summarize(results), "max_new_tokens": options.max_new_tokens}, questions.bad


def _value_rows(
    resolved: Resolved, context: InferenceContext, path: Path, identity: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Vectors or scores of the rows, by a model that reads texts."""
    from swift.data.persona import dataset_specs
    from swift.evaluate.values import read_rows_of_texts, value_texts
    from swift.inference.context import load_context
    from swift.inference.engines.embedded_core import EmbeddedCore

    data, engine = resolved.config.data, resolved.config.engine
    if engine.infer_backend != "transformers":
        raise ConfigError(
            "models that score or embed texts are read by the embedded engine",
            where=f"--infer_backend {engine.infer_backend}",
            fix="--infer_backend transformers",
        )
    rows, bad = read_rows_of_texts(
        dataset_specs(data, data.val_dataset), data.columns, context.task, data.on_bad_rows
    )
    _set_threads(resolved)
    bundle = load_context(context, resolved)
    core = EmbeddedCore(bundle, engine, task=context.task_options)
    with _Progress(len(rows), path) as progress:
        results = value_texts(
            core, bundle.template, rows, context.task, path, identity=identity, on_progress=progress.update
        )
    return {"num_rows": len(results)}, bad


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


def _set_threads(resolved: Resolved) -> None:
    import torch

    if resolved.config.training.num_threads is not None:
        torch.set_num_threads(resolved.config.training.num_threads)


def _generator(resolved: Resolved, context: InferenceContext) -> Generator:
    from swift.inference.context import load_context
    from swift.inference.engines.blocking import BlockingEngine
    from swift.inference.engines.table import make_engine
    from swift.inference.generate import Generator
    from swift.models.load import load_unloaded

    context.check_writes_text()
    _set_threads(resolved)
    if resolved.config.engine.infer_backend == "transformers":
        return Generator(load_context(context, resolved), options=resolved.config.engine)
    if resolved.config.data.val_dataset and "loss" in resolved.config.generation.metric:
        raise ConfigError(
            "the loss of given answers is computed by the embedded engine",
            where=f"--infer_backend {resolved.config.engine.infer_backend}",
            fix="leave loss out of --metric, or --infer_backend transformers",
        )
    bundle = load_unloaded(
        context.model,
        context.template,
        context.pretraining,
        trust_remote_code=resolved.config.model.trust_remote_code,
    )
    return Generator(bundle, BlockingEngine(make_engine(context, resolved)))


def _chat(resolved: Resolved) -> None:
    from swift.inference.context import find_context

    context = find_context(resolved)
    _say_note(context)
    generator = _generator(resolved, context)

    from swift.inference.chat import Chat

    chat = Chat(generator, resolved.config.generation, seed=resolved.config.training.seed)
    try:
        _converse(chat, context)
    finally:
        generator.engine.close()


def _converse(chat: Chat, context: InferenceContext) -> None:
    from swift.inference.chat import answer_lines, read_input

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
