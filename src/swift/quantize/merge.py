"""An adapter and its base model become one plain model folder, with a parity report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import folder_bytes, free_bytes
from swift.core.format import format_bytes
from swift.evaluate.evaluation import set_threads
from swift.inference.context import InferenceContext, find_context
from swift.models.compare import LogitsDifference
from swift.models.facts import ModelFacts
from swift.quantize.parity import Limits, ParityReport, weights_size
from swift.quantize.texts import held_out_probes

__all__ = ["MAX_PERPLEXITY_INCREASE", "keep_stored_precision", "merge", "merge_context"]

MAX_PERPLEXITY_INCREASE = 0.01
"""A merge rounds each weight once; in bfloat16 that is felt a little."""


def merge(resolved: Resolved, say: Callable[[str], None] = print) -> tuple[Path, ParityReport]:
    """Merge as the options say; returns the new folder and its report.

    Raises:
        ConfigError: there is no adapter, or the folder exists already.
        SwiftError: the disk is too full, or the merged model is not what base and adapter compute.
    """
    context = find_context(resolved)
    if context.adapter is None:
        raise ConfigError("there is no adapter to merge", where="--adapters", fix="--adapters RUN/last")
    folder = _target(resolved, context.adapter)
    _check_disk(context.model, folder)
    if note := context.note():
        say(note)
    set_threads(resolved)
    keep_stored_precision(resolved, context.model)
    report = merge_context(resolved, context, folder, say)
    say(f"merged    {folder}")
    if context.writes_text:
        say(f"next      swift infer --model {shlex.quote(str(folder))}")
    return folder, report


def merge_context(
    resolved: Resolved, context: InferenceContext, folder: Path, say: Callable[[str], None]
) -> ParityReport:
    """Merge what ``context`` names into ``folder``; the report lies in the folder.

    Raises:
        SwiftError: the folder cannot be written, or does not compute what base and adapter compute.
    """
    from swift.inference.context import load_context
    from swift.tuners.merge import merge_to_folder

    say(f"base      {context.model}\nadapter   {context.adapter}")
    bundle = load_context(context, resolved)
    tokenizer = bundle.tokenizer
    if context.template.chat_template is not None and bundle.template.chat is not None:
        tokenizer.chat_template = bundle.template.chat.source
    probes, probes_from = held_out_probes(resolved, context, bundle.template)
    limits = Limits.of(resolved, MAX_PERPLEXITY_INCREASE)
    reports: list[ParityReport] = []

    def finish(aside: Path, difference: LogitsDifference) -> None:
        report = ParityReport(
            method="merge",
            settings={"dtype": resolved.config.model.torch_dtype},
            original=f"{context.model} + {context.adapter}",
            text=probes_from,
            difference=difference,
            bytes_before=weights_size(context.model),
            bytes_after=weights_size(aside),
            loads={"transformers": "yes"},
            limits=limits,
            broken=limits.broken(difference),
        )
        report.write(aside)
        reports.append(report)

    try:
        difference = merge_to_folder(bundle.model, tokenizer, folder, probes=probes, finish=finish)
    except (OSError, SafetensorError) as error:
        raise SwiftError(
            "the merged model cannot be written",
            where=str(folder),
            why=str(error),
            fix="--output_dir elsewhere",
        ) from error
    say(f"check     {difference}")
    return reports[0]


def _target(resolved: Resolved, adapter: Path) -> Path:
    if resolved.is_explicit("output_dir"):
        folder = Path(resolved.config.checkpoint.output_dir).expanduser()
    else:
        real = adapter.resolve()
        folder = real.with_name(f"{real.name}-merged")
    if folder.exists():
        raise ConfigError(f"{folder} exists already", where="--output_dir", fix="--output_dir NEW_FOLDER")
    return folder


def _check_disk(model: Path, folder: Path) -> None:
    needed, free = folder_bytes(model), free_bytes(folder)
    if needed > free:
        raise SwiftError(
            f"the merged model needs about {format_bytes(needed)}, {format_bytes(free)} are free",
            where=str(folder),
            fix="--output_dir on another disk",
        )


def keep_stored_precision(resolved: Resolved, model: Path) -> None:
    """Without --torch_dtype the result gets the precision in which the base is stored."""
    if resolved.config.model.torch_dtype == "auto":
        stored = ModelFacts.read(model).dtype
        if stored in ("float32", "float16", "bfloat16"):
            resolved.config.model.torch_dtype = stored  # type: ignore[assignment]
