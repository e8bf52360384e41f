"""The texts of an export, as tokens made here with the model's own template: calibration rows, held-out text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.bind import load_run_config
from swift.config.export_rules import DEFAULT_CALIBRATION, LIBRARY_TEXT
from swift.config.schema import Resolved
from swift.config.sections.data import DataSection
from swift.config.sections.task import TaskSection
from swift.core.errors import ConfigError, DataError
from swift.data.load import load_data
from swift.data.tokens import TokenDataset
from swift.inference.context import InferenceContext
from swift.models.compare import Probe
from swift.models.facts import ModelFacts
from swift.models.load import load_template
from swift.models.template import Template

__all__ = ["calibration_rows", "held_out_probes", "longest_row", "read_template"]

_LONGEST_PROBE = 1024
"""Tokens of a text that two models are compared on: its logits are held in memory at once."""
_LIBRARY_WINDOW = 512
DEFAULT_LENGTH = 2048


def longest_row(resolved: Resolved, model: Path) -> int:
    """``max_length``, or what the model's context allows, 2048 at most."""
    limit = ModelFacts.read(model).max_position_embeddings or DEFAULT_LENGTH
    return min(resolved.config.data.max_length or DEFAULT_LENGTH, limit)


def read_template(resolved: Resolved, context: InferenceContext) -> Template:
    return load_template(
        context.model,
        context.template,
        context.pretraining,
        trust_remote_code=resolved.config.model.trust_remote_code,
    )


def calibration_rows(
    resolved: Resolved, context: InferenceContext, template: Template
) -> tuple[list[list[int]], str]:
    """(token ids of ``quant_n_samples`` rows, where they are from): ``--dataset``, else the run's training data,
    else documentation of Python's standard library.

    Rows that are too long are cut at the right (of a pre-training run: split).

    Raises:
        ConfigError: the run streamed its data.
        DataError: a file is missing or cannot be read.
    """
    section = resolved.config.data
    said = ", ".join(section.dataset)
    if not section.dataset:
        recorded = _recorded(context)
        if recorded is None or not recorded.config.data.dataset:
            width = min(longest_row(resolved, context.model), _LIBRARY_WINDOW)
            windows = _library_windows(template.tokenizer, width, resolved.config.export.quant_n_samples, 1)
            return windows, DEFAULT_CALIBRATION
        if recorded.config.data.streaming:
            raise ConfigError(
                "the run streamed its data",
                where="--dataset",
                fix=f"--dataset {recorded.config.data.dataset[0]}#1000",
            )
        section = _data_of_run(recorded)
        said = f"{', '.join(section.dataset)} (training data of the run)"
    rows, _ = _load(resolved, context, template, section)
    generator = np.random.default_rng(resolved.config.training.seed)
    wanted = min(resolved.config.export.quant_n_samples, len(rows))
    chosen = np.sort(generator.choice(len(rows), wanted, replace=False))
    return [rows[int(place)][0].tolist() for place in chosen], said


def held_out_probes(
    resolved: Resolved, context: InferenceContext, template: Template
) -> tuple[list[Probe], str]:
    """(texts to compare models on, where they are from), ``parity_tokens`` in all.

    ``--parity_dataset``; else the validation data of the run; else documentation of Python's standard library.
    """
    options = resolved.config.export
    total, longest = options.parity_tokens, min(longest_row(resolved, context.model), _LONGEST_PROBE)
    recorded = _recorded(context)
    rows: TokenDataset | None = None
    said = ""
    if options.parity_dataset:
        section = resolved.config.data.model_copy(update={"dataset": options.parity_dataset})
        rows, _ = _load(resolved, context, template, section)
        said = ", ".join(options.parity_dataset)
    elif recorded is not None and recorded.config.task.task_type == "causal_lm":
        section = _data_of_run(recorded)
        if section.val_dataset:
            update: dict[str, Any] = {
                "dataset": section.val_dataset,
                "val_dataset": [],
                "dataset_weights": [],
            }
            rows, _ = _load(resolved, context, template, section.model_copy(update=update))
            said = f"{', '.join(section.val_dataset)} (validation data of the run)"
        elif section.split_dataset_ratio > 0 and not recorded.config.data.streaming:
            _, rows = _load(resolved, context, template, section)
            said = f"validation part of {', '.join(section.dataset)} (as in the run)"
    if rows is None:
        width = min(longest, _LIBRARY_WINDOW)
        windows = _library_windows(template.tokenizer, width, max(1, total // width), 0)
        return [Probe.text(window) for window in windows], LIBRARY_TEXT
    probes: list[Probe] = []
    for place in np.random.default_rng(resolved.config.training.seed).permutation(len(rows)):
        ids, labels, _ = rows[int(place)]
        size = min(longest, total - sum(len(probe.ids) for probe in probes))
        if size < 2:
            break
        probes.append(Probe(ids[:size].tolist(), labels[:size].tolist()))
    return probes, said


def _library_windows(tokenizer: Any, width: int, wanted: int, part: int) -> list[list[int]]:
    """``wanted`` pieces of ``width`` tokens, spread evenly over the language reference that comes with Python.

    Part 0 (compared on) and part 1 (calibrated on) share no token. Fewer pieces where there is no more text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without its documentation, which is the text when no other is named",
            where="pydoc_data.topics",
            fix="--dataset FILE.jsonl for calibration, --parity_dataset FILE.jsonl for the comparison",
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    windows = [ids[start : start + width] for start in range(part * width, len(ids) - width + 1, 2 * width)]
    count = min(wanted, len(windows))
    return [windows[number * len(windows) // count] for number in range(count)]


def _recorded(context: InferenceContext) -> Resolved | None:
    return load_run_config(context.run) if context.run is not None else None


def _data_of_run(recorded: Resolved) -> DataSection:
    """The data options of a run; the seed of its split is kept."""
    section = recorded.config.data
    seed = section.data_seed if section.data_seed is not None else recorded.config.training.seed
    return section.model_copy(update={"data_seed": seed, "streaming": False, "packing": False})


def _load(
    resolved: Resolved, context: InferenceContext, template: Template, section: DataSection
) -> tuple[TokenDataset, TokenDataset | None]:
    cut = "split" if context.pretraining else "right"
    section = section.model_copy(update={"truncation_strategy": cut})
    config = resolved.config.model_copy(update={"data": section, "task": TaskSection()})
    try:
        loaded = load_data(replace(resolved, config=config), template, longest_row(resolved, context.model))
    except DataError as error:
        fix = (
            error.fix
            or "--dataset FILE.jsonl for calibration, --parity_dataset FILE.jsonl for the comparison"
        )
        raise DataError(error.message, where=error.where, why=error.why, fix=fix) from error
    return loaded.train, loaded.validation
