"""What can be refused in a fraction of a second, before torch or transformers are imported."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from pathlib import Path

from swift.config.bind import load_run_config
from swift.config.parallel_rules import processes_of_launcher
from swift.config.schema import Resolved
from swift.core.devices import cpu_count, nvidia_memory
from swift.core.errors import ConfigError, ModelError, SwiftError
from swift.data.hub import pin_datasets
from swift.data.persona import dataset_specs
from swift.data.sources import find_files
from swift.models.facts import check_model_folder
from swift.models.locate import derive_chat_template, pin_model
from swift.models.quantised import check_packages
from swift.runs.folder import RunFolder, find_latest_run, locate
from swift.train.optimizers import check_optimizer
from swift.tuners.registry import check_peft

__all__ = ["check_goes_on", "check_tuner_options", "find_checkpoint", "preflight"]


def preflight(resolved: Resolved, *, begins: bool = True) -> Path:
    """Check that model, data and output folder can be used; returns the model's folder.

    Without ``begins`` the run folder is there already: another process has made it.

    What is on a hub is downloaded where it is not here; from then on the configuration names folders and commit.

    Raises:
        HubError: model or data are not here and cannot be fetched.
        ConfigError: no model, no data, a callback file that is missing, or an output folder that cannot be used.
        ModelError: the model folder is incomplete, or an adapter is missing.
        DataError: a data file is missing.
    """
    config = resolved.config
    if config.model.model is None:
        raise ConfigError("which model?", where="--model", fix="--model FOLDER")
    if not config.data.dataset:
        raise ConfigError("which data?", where="--dataset", fix="--dataset FILE.jsonl")
    name = config.model.model
    folder = pin_model(config.model)
    check_model_folder(folder)
    if resolved.command != "pt":
        derive_chat_template(resolved, name, folder)
    check_packages(config.quantization)
    check_peft(config.tuner)
    check_optimizer(config.optimizer)
    _check_attention(config.model.attn_impl)
    _check_processes(resolved)
    pin_datasets(resolved)
    for spec in dataset_specs(config.data, [*config.data.dataset, *config.data.val_dataset]):
        find_files(spec)
    for adapter in config.model.adapters:
        if not Path(adapter).expanduser().is_dir():
            raise ModelError(
                "no such folder", where=f"--adapters {adapter}", fix="name an adapter, a run or a checkpoint"
            )
    for callback in config.report.callbacks:
        if not Path(callback.partition(":")[0]).is_file():
            raise ConfigError("no such file", where=f"--callbacks {callback}")
    if config.training.torch_compile and config.training.neftune_noise_alpha:
        raise ConfigError(
            "does not go together with torch_compile: a compiled model leaves the noise out",
            where="--neftune_noise_alpha",
            fix="leave out --torch_compile or --neftune_noise_alpha",
        )
    if config.checkpoint.resume_from_checkpoint is None and begins:
        _check_output(Path(config.checkpoint.output_dir), config.checkpoint.run_name)
    return folder


_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def _check_attention(implementation: str) -> None:
    """Raise ConfigError when nothing on this machine computes it: else transformers says so after minutes."""
    package = _ATTENTION_PACKAGES.get(implementation)
    # transformers takes the same functions from the package kernels where that is installed.
    if package is not None and not any(importlib.util.find_spec(name) for name in (package, "kernels")):
        raise ConfigError(
            f"the package {package} is not installed",
            where=f"--attn_impl {implementation}",
            fix="leave it out: auto takes the fastest exact one; or: pip install "
            + ("flash-attn --no-build-isolation" if package == "flash_attn" else "kernels"),
        )


_PROCESSES_ON_CPU = 16
"""So many may always be tried without an accelerator: a test of a layout needs some."""


def _check_processes(resolved: Resolved) -> None:
    """Raise ConfigError for more processes than this machine can run: starting them would bring it to a halt."""
    section = resolved.config.parallel
    wanted = section.nproc_per_node or section.num_processes // section.nnodes
    kind = resolved.config.model.device.partition(":")[0]
    if kind not in ("auto", "cuda", "cpu") or processes_of_launcher() is not None:
        return
    devices = len(nvidia_memory()) if wanted > 1 and kind != "cpu" else 0
    if wanted > (devices or max(_PROCESSES_ON_CPU, 4 * cpu_count())):
        raise ConfigError(
            f"the layout takes {wanted} processes, each with a device of its own",
            where=resolved.place("nproc_per_node"),
            why=f"there are {devices} CUDA devices"
            if devices
            else f"there are {cpu_count()} cores and no accelerator",
            fix="smaller sizes, or a machine (--nnodes N machines) with so many; swift plan says what each has to hold",
        )


_RECORDED = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options -> keys of PEFT's adapter_config.json."""


def check_tuner_options(resolved: Resolved, adapter: Path) -> None:
    """Refuse tuner options that say something else than the adapter that training goes on from.

    Raises ConfigError: its folder decides how it is made; options beside it would be ignored.
    """
    file = adapter / "adapter_config.json"
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("broken adapter configuration", where=str(file), why=str(error)) from None
    for name in type(resolved.config.tuner).model_fields:
        if name == "tuner_type" or not resolved.is_explicit(name):
            continue
        value = resolved.value(name)
        if name not in _RECORDED or recorded.get(_RECORDED[name]) != value:
            raise ConfigError(
                f"the adapter {adapter} is made as it is: {name} {value} would have no effect",
                where=f"--{name}",
                why=f"its {_RECORDED[name]} is {recorded.get(_RECORDED[name])}"
                if name in _RECORDED
                else None,
                fix=f"leave out --{name}, or leave out --adapters for a new adapter",
            )


_KEPT = (
    "tuner_type", "lora_rank", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_regex",
    "target_parameters", "modules_to_save",
)  # fmt: skip
"""Options that say what the weights of a checkpoint are."""


def check_goes_on(resolved: Resolved, checkpoint: Path) -> None:
    """Refuse to go on from ``checkpoint`` with other trained weights than it holds. Raises ConfigError."""
    before = load_run_config(checkpoint).config.tuner
    for name in _KEPT:
        was, value = getattr(before, name), resolved.value(name)
        if was != value:
            run = shlex.quote(str(checkpoint.parent))
            kind = "model" if before.trains_whole_model else "adapters"
            raise resolved.error(
                name,
                f"the run was begun with {name} {_words(was)} and cannot go on with {_words(value)}",
                fix=f"swift resume {run} goes on with the run's own options; "
                f"a new run from these weights: --{kind} {shlex.quote(str(checkpoint))}",
            )


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_output(output_dir: Path, run_name: str | None) -> None:
    """Refuse a folder that cannot be written, and a name that is taken, without creating anything."""
    parent = output_dir.expanduser().absolute()
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot create a run folder in {parent}",
            where="--output_dir",
            why=f"{existing} is {'not writable' if existing.is_dir() else 'a file'}",
            fix="name a folder you may write to: --output_dir PATH",
        )
    run = RunFolder(parent / run_name) if run_name is not None else None
    if run is not None and run.holds_run():
        path = shlex.quote(str(run.path))
        begun = run.latest_checkpoint() is not None
        raise ConfigError(
            f"{run.path} already holds a run"
            + ("" if begun else ", which ended before its first checkpoint"),
            where="--run_name",
            fix=f"go on with it: swift resume {path}; or choose another --run_name"
            if begun
            else f"delete it: rm -r {path}; or choose another --run_name",
        )


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
