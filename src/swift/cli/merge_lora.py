"""``swift merge-lora``: an adapter and its base model become one plain model folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import folder_bytes, free_bytes
from swift.core.format import format_bytes


def run(argv: list[str]) -> int:
    """Merge, check, print the difference. Exit code 1 when the merged model computes something else."""
    resolved = resolve("merge-lora", argv)
    merge(resolved)
    return 0


def merge(resolved: Resolved) -> Path:
    """Merge as the options say; returns the new folder.

    Raises:
        ConfigError: the folder exists already.
        SwiftError: the disk is too full, or the merged model is not what base and adapter compute.
    """
    from swift.inference.context import find_context

    context = find_context(resolved)
    if context.adapter is None:
        raise ConfigError("there is no adapter to merge", where="--adapters", fix="--adapters RUN/last")
    folder = _target(resolved, context.adapter)
    _check_disk(context.model, folder)

    from swift.inference.context import load_context
    from swift.tuners.merge import merge_to_folder

    note = context.note()
    if note:
        print(note)
    print(f"base     {context.model}\nadapter  {context.adapter}", flush=True)
    _set_threads(resolved)
    _keep_stored_precision(resolved, context.model)
    bundle = load_context(context, resolved)
    tokenizer = bundle.tokenizer
    if context.template.chat_template is not None and bundle.template.chat is not None:
        tokenizer.chat_template = bundle.template.chat.source
    try:
        difference = merge_to_folder(bundle.model, tokenizer, folder)
    except OSError as error:
        raise SwiftError(
            "the merged model cannot be written",
            where=str(folder),
            why=error.strerror,
            fix="--output_dir elsewhere",
        ) from error
    print(f"check    {difference}\nmerged   {folder}")
    if context.writes_text:
        print(f"next     swift infer --model {shlex.quote(str(folder))}")
    return folder


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


def _keep_stored_precision(resolved: Resolved, model: Path) -> None:
    """Without --torch_dtype the merged model gets the precision in which the base is stored."""
    from swift.models.facts import ModelFacts

    if resolved.config.model.torch_dtype == "auto":
        stored = ModelFacts.read(model).dtype
        if stored in ("float32", "float16", "bfloat16"):
            resolved.config.model.torch_dtype = stored  # type: ignore[assignment]


def _set_threads(resolved: Resolved) -> None:
    if resolved.config.training.num_threads is not None:
        import torch

        torch.set_num_threads(resolved.config.training.num_threads)
