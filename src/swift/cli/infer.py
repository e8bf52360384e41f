"""``swift infer``: chat with a model, or answer the rows of a file."""

from __future__ import annotations

import contextlib
import datetime
import gc
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


def run(argv: list[str]) -> int:
    """Batch with ``--val_dataset``, conversation on a terminal, else one answer for each line of the input."""
    gc.disable()  # until the model is there: millions of objects are made that stay
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
    from swift.evaluate.evaluation import identity_of
    from swift.evaluate.results import write_metrics
    from swift.inference.context import find_context

    pin_datasets(resolved)
    context = find_context(resolved)
    _say_note(context)
    path = _result_path(resolved, context)
    work = _answer_rows if context.writes_text else _value_rows
    summary, bad = work(resolved, context, path, identity_of(context))
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
    from swift.cli.progress import AnswerProgress
    from swift.evaluate.answers import answer_tasks, summarize
    from swift.evaluate.evaluation import limited, load_generator
    from swift.evaluate.subjects import LocalModel
    from swift.evaluate.suite import read_tasks, task_specs

    (task,) = read_tasks(resolved, task_specs(resolved), answers=True)
    generator = load_generator(resolved, context, losses=task.needs("loss") or task.needs("choice"))
    _collect_again()
    if context.run is not None and not task.fixed_length:
        limited(task, generator.tokenizer)
    seed = resolved.config.training.seed if task.options.temperature > 0 else None
    subject = LocalModel(generator, identity)
    try:
        with AnswerProgress(_go_on(path), len(task.questions.good)) as progress:
            results = answer_tasks(subject, [task], path, seed=seed, on_progress=progress.update)
    finally:
        generator.engine.close()
    summary = {**summarize(results, task.evaluators), "max_new_tokens": task.options.max_new_tokens}
    return summary, task.questions.bad


def _collect_again() -> None:
    gc.freeze()  # what is loaded by now stays and need not be searched for garbage
    gc.enable()


def _go_on(path: Path) -> str:
    return f"the same command with --result_path {path} goes on"


def _value_rows(
    resolved: Resolved, context: InferenceContext, path: Path, identity: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Vectors or scores of the rows, by a model that reads texts."""
    from swift.cli.progress import AnswerProgress
    from swift.data.persona import dataset_specs
    from swift.evaluate.evaluation import set_threads
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
    set_threads(resolved)
    bundle = load_context(context, resolved)
    _collect_again()
    core = EmbeddedCore(bundle, engine, task=context.task_options)
    with AnswerProgress(_go_on(path), len(rows)) as progress:
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


def _chat(resolved: Resolved) -> None:
    from swift.evaluate.evaluation import load_generator
    from swift.inference.context import find_context

    context = find_context(resolved)
    _say_note(context)
    generator = load_generator(resolved, context)
    _collect_again()

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


def _print_summary(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        print(f"{name:15} {value:.4f}" if isinstance(value, float) else f"{name:15} {value}")
