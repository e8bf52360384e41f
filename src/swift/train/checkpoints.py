"""Checkpoints: complete or absent.

A checkpoint folder holds the weights in the form others load (PEFT adapter, or transformers model with tokenizer),
the optimizer, ``state.json`` (counters and data cursor; written last inside the aside folder) and ``config.yaml``.
Generator states are not needed: see `swift.train.seeds`.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swift.core.errors import SwiftError
from swift.core.files import atomic_directory, free_bytes
from swift.core.format import format_bytes
from swift.parallel.engine import Engine
from swift.parallel.world import World
from swift.train.state import TrainState
from swift.train.weights import Collect, save_gathered
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel
from swift.tuners.peft_format import load_adapter, save_adapter

__all__ = [
    "MASTER_FILE",
    "PendingSave",
    "checkpoint_bytes",
    "load_checkpoint",
    "read_state",
    "save_checkpoint",
]

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
    also: Callable[[Path | None], None] | None = None,
    world: World | None = None,
) -> PendingSave:
    """Write a checkpoint aside; `PendingSave.finish` renames it to ``path``. ``also`` writes more into it
    (all processes call it, all but rank 0 with None).

    Of several processes all call this. What only a resumed run needs is then still being written when it returns.

    Raises:
        SwiftError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    engine.settle()
    world = world or World()
    closing = contextlib.ExitStack()
    with _explained(path), closing:
        folder = closing.enter_context(atomic_directory(path)) if world.is_main else None
        if world.size == 1:
            assert folder is not None
            if tuned.kind == "full":
                _save_full(folder, tuned, export_dtype, engine.gather() if not only_model else {})
            else:
                save_adapter(tuned.model, folder, base_path, name=tuned.adapter or DEFAULT_ADAPTER)
        else:
            _save_gathered(folder, tuned, export_dtype, base_path, engine.collect)
        if also is not None and not only_model:
            also(folder)
        if folder is not None:
            tokenizer.save_pretrained(folder)
            shutil.copyfile(config_file, folder / "config.yaml")
            extra = tuned.other.state() if tuned.other and not only_model else {}
            if extra:
                save_file(extra, folder / TUNER_FILE)
            (folder / STATE_FILE).write_text(json.dumps(state.to_dict(), indent=2))
        written = None
        if world.size > 1 and not only_model:
            written = engine.begin_saving(world.from_main(folder or Path()))
        elif folder is not None and not only_model:
            engine.save(folder)
        kept = closing.pop_all()
    return PendingSave(path, written, kept)


class PendingSave:
    """A checkpoint that is complete but for what a thread still writes, and for its name."""

    def __init__(self, path: Path, written: Any, closing: contextlib.ExitStack) -> None:
        self.path, self._written, self._closing = path, written, closing

    @property
    def is_written(self) -> bool:
        return self._written is None or self._written.done()

    def finish(self) -> None:
        """Wait for the thread, and give the folder its name. Raises SwiftError when it cannot be written."""
        with _explained(self.path), self._closing:
            if self._written is not None:
                self._written.result()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SwiftError(
            "the checkpoint could not be written",
            where=str(path),
            why=f"{error} ({format_bytes(free_bytes(path.parent))} free)",
            fix=f"free some space, then: swift resume {shlex.quote(str(path.parent))}",
        ) from error


def _save_gathered(
    folder: Path | None,
    tuned: TunedModel,
    export_dtype: torch.dtype,
    base_path: Path,
    collect: Collect,
) -> None:
    """The weights of several ranks; ``folder`` is None on those that do not write."""
    model: Any = tuned.model
    if tuned.kind != "full":
        save_adapter(model, folder, base_path, name=tuned.adapter or DEFAULT_ADAPTER, collect=collect)
        return
    model.config.use_cache = True
    try:
        save_gathered(model, folder, export_dtype, collect)
    finally:
        model.config.use_cache = False


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


def load_checkpoint(path: Path, *, tuned: TunedModel) -> None:
    """Put the weights of ``path`` into a model that was just built from the run's configuration; before it is sharded.

    For full training the weights themselves are loaded with the model (its path is the checkpoint); only rounded
    ones are restored here. The optimizer is the engine's (``engine.load``).
    """
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


def checkpoint_bytes(tuned: TunedModel, *, only_model: bool) -> int:
    """About how large one checkpoint will be: weights, and two optimizer moments per trainable weight."""
    trainable = sum(p.numel() * p.element_size() for p in tuned.named_trainable().values())
    weights = trainable
    if tuned.kind == "full":
        weights = sum(p.numel() * p.element_size() for p in tuned.model.parameters())
    return weights + (0 if only_model else 2 * trainable)
