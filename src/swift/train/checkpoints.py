"""Checkpoints: complete or absent.

A checkpoint folder holds the weights in the form others load (PEFT adapter, or transformers model with tokenizer),
the optimizer, ``state.json`` (counters and data cursor; written last inside the aside folder) and ``config.yaml``.
Generator states are not needed: see `swift.train.seeds`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swift.core.errors import SwiftError
from swift.core.files import atomic_directory, free_bytes
from swift.core.format import format_bytes
from swift.parallel.engine import Engine
from swift.train.state import TrainState
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel
from swift.tuners.peft_format import load_adapter, save_adapter

__all__ = ["checkpoint_bytes", "load_checkpoint", "read_state", "save_checkpoint"]

STATE_FILE = "state.json"
MASTER_FILE = "master_weights.safetensors"
TUNER_FILE = "tuner_state.safetensors"


def save_checkpoint(
    path: Path,
    *,
    tuned: TunedModel,
    tokenizer: Any,
    base_path: Path,
    export_dtype: torch.dtype,
    engine: Engine,
    state: TrainState,
    config_file: Path,
    only_model: bool,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint aside and rename it to ``path``; ``also`` writes more into it.

    Raises:
        SwiftError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    engine.settle()
    try:
        with atomic_directory(path) as folder:
            if tuned.kind == "full":
                _save_full(folder, tuned, export_dtype, engine.gather() if not only_model else {})
            else:
                save_adapter(tuned.model, folder, base_path, name=tuned.adapter or DEFAULT_ADAPTER)
            tokenizer.save_pretrained(folder)
            shutil.copyfile(config_file, folder / "config.yaml")
            if not only_model:
                engine.save(folder)
                extra = tuned.other.state() if tuned.other else {}
                if extra:
                    save_file(extra, folder / TUNER_FILE)
            if also is not None and not only_model:
                also(folder)
            (folder / STATE_FILE).write_text(json.dumps(state.to_dict(), indent=2))
    except (OSError, SafetensorError) as error:
        raise SwiftError(
            "the checkpoint could not be written",
            where=str(path),
            why=f"{error} ({format_bytes(free_bytes(path.parent))} free)",
            fix=f"free some space, then: swift resume {shlex.quote(str(path.parent))}",
        ) from error


def _save_full(
    folder: Path, tuned: TunedModel, export_dtype: torch.dtype, masters: dict[str, torch.Tensor]
) -> None:
    """The model in its own precision; where that rounds ``masters``, these as well, for exact resume."""
    model: Any = tuned.model
    state = {
        name: tensor.to(export_dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.config.use_cache = True  # off in training only; who loads the folder wants it
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.use_cache = False
    rounded = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in masters.items()
        if tensor.dtype != export_dtype
    }
    if rounded:
        save_file(rounded, folder / MASTER_FILE)


def read_state(path: Path) -> TrainState:
    """The counters of a checkpoint. Raises SwiftError when ``path`` is not a complete checkpoint."""
    file = path / STATE_FILE
    try:
        return TrainState.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SwiftError(
            "not a complete checkpoint",
            where=str(path),
            why=f"{STATE_FILE} is missing or unreadable",
            fix="name a checkpoint-N folder or the run folder that holds it",
        ) from error


def load_checkpoint(path: Path, *, tuned: TunedModel, engine: Engine) -> TrainState:
    """Put weights and optimizer of ``path`` into a model that was just built from the run's configuration.

    For full training the weights themselves are loaded with the model (its path is the checkpoint); only rounded
    ones are restored here.
    """
    state = read_state(path)
    if tuned.kind != "full":
        load_adapter(tuned.model, path, tuned.adapter or DEFAULT_ADAPTER, trainable=True)
        if tuned.other and (path / TUNER_FILE).is_file():
            tuned.other.load_state(load_file(path / TUNER_FILE))
    elif (path / MASTER_FILE).is_file():
        master = load_file(path / MASTER_FILE)
        with torch.no_grad():
            for name, parameter in tuned.named_trainable().items():
                if name in master:
                    parameter.copy_(master[name])
    engine.load(path)
    return state


def checkpoint_bytes(tuned: TunedModel, *, only_model: bool) -> int:
    """About how large one checkpoint will be: weights, and two optimizer moments per trainable weight."""
    trainable = sum(p.numel() * p.element_size() for p in tuned.named_trainable().values())
    weights = trainable
    if tuned.kind == "full":
        weights = sum(p.numel() * p.element_size() for p in tuned.model.parameters())
    return weights + (0 if only_model else 2 * trainable)
