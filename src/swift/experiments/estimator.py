"""What a job will need, for the scheduler and for the user: the plan of its run in a few numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swift.config.adapter_names import split_name
from swift.config.bind import dump
from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.data.hub import is_here, with_hub
from swift.data.sources import find_files, parse_dataset_spec
from swift.experiments.types import TRAINING
from swift.models.facts import check_model_folder
from swift.models.locate import find_model
from swift.runs.record import data_fingerprint

__all__ = ["Estimator", "changed_data"]

_IRRELEVANT = ("run_name", "output_dir", "learning_rate", "seed", "data_seed", "weight_decay", "lora_alpha")
"""Options that change neither steps nor memory: trials that differ in them share one plan."""


class Estimator:
    """Plans and fingerprints, each made once for all experiments that share it.

    Args:
        made: run folders that other jobs of the same file will have made by then: what lies in them is not looked for.
    """

    def __init__(self, made: Iterable[Path] = ()) -> None:
        self._made = tuple(made)
        self._plans: dict[str, dict[str, Any]] = {}
        self._prints: dict[tuple[str, int, int], dict[str, Any]] = {}

    def _comes_later(self, path: str | Path) -> bool:
        path = Path(path)
        return any(path == folder or folder in path.parents for folder in self._made)

    def check_inputs(self, resolved: Resolved) -> None:
        """Raise ModelError or DataError for a model, adapter or data file that is not there."""
        model = resolved.config.model.model
        if model is not None and not self._comes_later(model):
            found = find_model(resolved.config.model)
            folder = None if found is None else found.folder  # None: the job downloads it
            if folder is not None and ((folder / "config.json").is_file() or resolved.command in TRAINING):
                check_model_folder(folder)
        for _, adapter in map(split_name, resolved.config.model.adapters):
            if not self._comes_later(adapter) and not Path(adapter).exists():
                raise SwiftError("no such folder", where=adapter, fix="name a run, or one of its checkpoints")
        for name in self._data(resolved):
            find_files(parse_dataset_spec(name))

    def _data(self, resolved: Resolved) -> list[str]:
        data = resolved.config.data
        names = [*data.dataset, *data.val_dataset, *resolved.config.export.parity_dataset]
        here = [name for name in names if not self._comes_later(parse_dataset_spec(name).path)]
        # A data set of a hub that is not on this machine is the job's to download.
        named = [with_hub(name, resolved.config.model) for name in here]
        return [name for name in named if is_here(parse_dataset_spec(name))]

    def fingerprints(self, resolved: Resolved, cwd: Path) -> list[dict[str, Any]]:
        """Path, bytes and hash of every data file, and of the files that options name (template, callbacks)."""
        files = [file for name in self._data(resolved) for file in find_files(parse_dataset_spec(name))]
        template, report = resolved.config.template, resolved.config.report
        named = [
            template.system,
            template.chat_template,
            *(name.partition(":")[0] for name in report.callbacks),
        ]
        for name in named:
            if name and len(name) < 4096 and "\n" not in name and (cwd / name).is_file():
                files.append(cwd / name)
        return [self._fingerprint(file) for file in dict.fromkeys(files)]

    def _fingerprint(self, file: Path) -> dict[str, Any]:
        facts = file.stat()
        key = (str(file), facts.st_mtime_ns, facts.st_size)
        if key not in self._prints:
            self._prints[key] = data_fingerprint(file)
        return self._prints[key]

    def estimate(self, resolved: Resolved, like: dict[str, Any] | None = None) -> dict[str, Any]:
        """Memory, steps, tokens of a job; None where the plan does not know.

        ``like``: the estimate of a training. A job that uses what it makes is as large as its model, which cannot
        be looked at yet.
        """
        adapters = [folder for _, folder in map(split_name, resolved.config.model.adapters)]
        used = [resolved.config.model.model, *adapters]
        if (
            like
            and resolved.command not in TRAINING
            and any(self._comes_later(path) for path in used if path)
        ):
            return _inference_like(resolved.command, like)
        record = dump(resolved)
        record.pop("explicit", None)
        for options in record.values():
            if isinstance(options, dict):
                for name in _IRRELEVANT:
                    options.pop(name, None)
        key = json.dumps(record, sort_keys=True, default=str)
        if key not in self._plans:
            self._plans[key] = self._plan(resolved)
        return copy.deepcopy(self._plans[key])

    @staticmethod
    def _plan(resolved: Resolved) -> dict[str, Any]:
        from swift.plan.plan import make_plan

        plan = make_plan(resolved)
        tokens, total = plan.steps.get("tokens_per_step"), plan.steps.get("total")
        memory = plan.memory.get("total")
        if memory is None and plan.model.get("parameters"):
            memory = _inference_bytes(plan.model)
        disk = plan.memory.get("disk", {})
        return {
            "memory_bytes": memory,
            "weights_bytes": plan.memory.get("parts", {}).get("weights"),
            "memory_key": _memory_key(resolved, plan.model),
            "steps": total,
            "steps_per_epoch": plan.steps.get("steps_per_epoch"),
            "tokens": tokens * total if tokens and total else None,
            "parameters": plan.model.get("parameters"),
            "trainable_parameters": plan.model.get("trainable_parameters"),
            "dtype": plan.model.get("dtype"),
            "seconds": plan.time.get("seconds"),
            "disk_bytes": disk.get("total_bytes"),
            "devices_needed": plan.parallel.get("devices_needed", 1),
            "device": plan.parallel.get("device"),
            "fits": plan.fits,
            "warnings": plan.warnings,
        }


def _inference_bytes(model: dict[str, Any]) -> int:
    """Weights, a fifth more for keys, values and logits, and the framework itself."""
    from swift.plan.analytic import CONTEXT_BYTES, DTYPE_BYTES

    return round(model["parameters"] * DTYPE_BYTES.get(model["dtype"], 4) * 1.2) + CONTEXT_BYTES["cuda"]


def _inference_like(command: str, like: dict[str, Any]) -> dict[str, Any]:
    parameters = like.get("parameters")
    return {
        "memory_bytes": _inference_bytes({"parameters": parameters, "dtype": like["dtype"]})
        if parameters
        else None,
        "memory_key": f"{command}/-/{like['memory_key'].partition('/')[2].partition('/')[2]}",
        "parameters": parameters,
        "dtype": like.get("dtype"),
        "devices_needed": 1,
        "device": like.get("device"),
        "warnings": [],
    }


def _memory_key(resolved: Resolved, model: dict[str, Any]) -> str:
    """Jobs alike enough that what one needed tells about the others."""
    if not model:
        return resolved.command
    tuner = resolved.config.tuner.tuner_type if resolved.command in TRAINING else "-"
    return f"{resolved.command}/{tuner}/{model['architecture']}/{model['parameters']}/{model['dtype']}"


def changed_data(fingerprints: Iterable[dict[str, Any]]) -> list[str]:
    """The files whose content is not the one recorded, as ``PATH: what happened``."""
    changed = []
    for record in fingerprints:
        path = Path(record["path"])
        try:
            if path.stat().st_size != record["bytes"]:
                changed.append(f"{path}: {record['bytes']} bytes then, {path.stat().st_size} now")
            elif data_fingerprint(path) != record:
                changed.append(f"{path}: other content than when it was submitted")
        except OSError as error:
            changed.append(f"{path}: {error.strerror or error}")
    return changed
