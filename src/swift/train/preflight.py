"""What can be refused in a fraction of a second, before torch or transformers are imported."""

from __future__ import annotations

from pathlib import Path

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.data.sources import find_files, parse_dataset_spec
from swift.models.facts import check_model_folder, resolve_model_path
from swift.runs.folder import find_latest_run, locate

__all__ = ["find_checkpoint", "preflight"]


def preflight(resolved: Resolved) -> Path:
    """Check that model and data are there and that this version can do what is asked; returns the model's folder.

    Raises:
        ConfigError: no model, no data, or a parallel layout (one device only in this version).
        ModelError: the model folder is incomplete.
        DataError: a data file is missing.
    """
    config = resolved.config
    if config.model.model is None:
        raise ConfigError("which model?", where="--model", fix="--model FOLDER")
    if not config.data.dataset:
        raise ConfigError("which data?", where="--dataset", fix="--dataset FILE.jsonl")
    _refuse_parallel(resolved)
    folder = resolve_model_path(config.model.model)
    check_model_folder(folder)
    for name in [*config.data.dataset, *config.data.val_dataset]:
        find_files(parse_dataset_spec(name).path)
    return folder


def find_checkpoint(resolved: Resolved) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start."""
    wanted = resolved.config.checkpoint.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "last":
        run = find_latest_run(resolved.config.checkpoint.output_dir)
        if run is None:
            raise SwiftError(
                "there is no run to resume",
                where="--resume_from_checkpoint last",
                why=f"no run folder in {resolved.config.checkpoint.output_dir}",
                fix="name the run folder instead of `last`",
            )
        checkpoint = run.latest_checkpoint()
    else:
        run, checkpoint = locate(wanted)
        checkpoint = checkpoint or run.latest_checkpoint()
    if checkpoint is None:
        raise SwiftError(
            "this run has no checkpoint yet",
            where=str(run.path),
            fix="start it again without --resume_from_checkpoint",
        )
    return checkpoint


def _refuse_parallel(resolved: Resolved) -> None:
    section = resolved.config.parallel
    larger = {
        name: size for name, size in section.model_dump().items() if name.endswith("_size") and size > 1
    }
    if larger or section.sequence_parallel:
        named = " ".join(f"--{name} {size}" for name, size in larger.items()) or "--sequence_parallel"
        raise ConfigError(
            f"{named}: this version trains on one device",
            why="the parallel engines come with a later release; `swift plan` accepts these sizes",
            fix="leave the parallel sizes at 1",
        )
