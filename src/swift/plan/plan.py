"""What a run will do and cost, before it starts. No torch, no network; what cannot be resolved is a warning."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swift.config.adapter_names import split_name
from swift.config.bind import dump
from swift.config.policy_rules import steps_of_prompts
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError, UsageError
from swift.data.mode import DEFAULT_MAX_LENGTH, batch_mode, derive_layout
from swift.models.facts import ModelFacts, check_model_folder
from swift.models.locate import derive_chat_template, find_model, not_here
from swift.models.registry import ModelEntry, find_entry, own_folder
from swift.parallel.accepted import Decoder, check_dimensions
from swift.parallel.layout import Layout
from swift.plan.analytic import Setup
from swift.plan.data import count_validation, data_part, planned_rows
from swift.plan.device import DeviceFacts, find_device
from swift.plan.export import export_plan, source_of
from swift.plan.result import Plan
from swift.plan.rows import RowPlan, known_rows, plan_rows
from swift.plan.sampling import answers_to_prompts
from swift.plan.serving import base_of_adapter, serving_memory
from swift.plan.setup import ExactMethod, Widest, compute_dtype, make_setup, memory_of
from swift.plan.solve import Situation, solve
from swift.plan.speed import measure_pace, read_pace, remember, run_key, time_of
from swift.plan.steps import Epoch, plan_epoch, step_counts
from swift.plan.verdict import TIGHT_SHARE, fits
from swift.rl.sizes import answers_in_step, derive_sizes

__all__ = ["make_plan", "remember_run"]


def make_plan(
    resolved: Resolved,
    lengths: Sequence[int] | None = None,
    *,
    device_memory: int | None = None,
    exact: ExactMethod | None = None,
    solving: bool = False,
    probe: bool = False,
) -> Plan:
    """Plan ``resolved`` without changing it. Raises ConfigError only for options that contradict what is known.

    Args:
        lengths: tokens of every sample (those set aside by split_dataset_ratio included) when the data is tokenised
            already; else rows are counted and tokens estimated from a sample of them.
        device_memory: bytes of a device that is not here, or of the share of it that may be used.
        exact: another method than the formulas.
        solving: also find out what would fit.
        probe: measure how fast this device trains when nobody knows yet (imports torch).
    """
    resolved = copy.deepcopy(resolved)
    warnings = list(resolved.warnings)
    device = find_device(resolved.config.model.device, device_memory)
    facts, folder = _read_model(resolved, warnings)
    if facts is not None:
        _check_layout(resolved, facts, warnings)
    _derive(resolved, facts, device, warnings)
    _look_for_files(resolved, warnings)
    is_here = device_memory is None and device.count != 0
    run = _Run(resolved, facts, folder, device, is_here, warnings)
    training: _Training | None = None
    parts: dict[str, Any] = {}
    if resolved.command in ("pt", "sft", "rlhf"):
        training = _plan_training(run, lengths, exact, probe)
        parts = training.parts
    elif resolved.command == "export":
        read = partial(planned_rows, resolved, folder, warnings)
        parts["export"], parts["memory"] = export_plan(resolved, facts, folder, device, warnings, read)
    elif resolved.command == "deploy" and facts is not None:
        parts["memory"] = serving_memory(resolved, facts, device, compute_dtype(resolved, device))
    if solving:
        parts["solution"] = _solve(run, training)
    plan = Plan(
        command=resolved.command,
        config=dump(resolved),
        sources={name: str(source) for name, source in resolved.sources.items()},
        model=_model(resolved, facts, folder, training.setup if training else None, device),
        parallel=_parallel(resolved, device),
        warnings=warnings,
        **parts,
    )
    plan.fits = fits(plan, device)
    return plan


@dataclass(frozen=True)
class _Run:
    """What is planned and for which device, maybe one of this machine; ``warnings`` grow while it is looked at."""

    resolved: Resolved
    facts: ModelFacts | None
    folder: Path | None
    device: DeviceFacts
    is_here: bool
    warnings: list[str]


@dataclass(frozen=True)
class _Training:
    """A training on paper: parts of the plan, what decides its memory (None: the model is not known), and the largest
    micro-batch that its data and other options would make."""

    parts: dict[str, dict[str, Any]]
    setup: Setup | None
    widest_of: Callable[[Resolved], Widest]


def _plan_training(
    run: _Run, lengths: Sequence[int] | None, exact: ExactMethod | None, probe: bool
) -> _Training:
    resolved, facts, device = run.resolved, run.facts, run.device
    if lengths is not None:
        rows = known_rows(resolved, lengths)
    else:
        rows = planned_rows(resolved, run.folder, run.warnings)
    data, fitting = data_part(resolved, rows, run.warnings)
    parts: dict[str, dict[str, Any]] = {"data": data, "steps": {}}
    widest = _widest(resolved, rows.sequences)
    if fitting:
        parts["steps"], found = _steps(resolved, rows, fitting, run.warnings)
        widest = widest if rows.is_guessed else found  # memory is not promised by a guess
    setup: Setup | None = None
    if facts is not None:
        setup = make_setup(resolved, facts, run.folder, device, widest, run.warnings)
        traced = exact(resolved, facts, run.folder, widest, setup) if exact else None
        parts["memory"] = memory_of(resolved, facts, setup, device, parts["steps"], traced)
        if parts["steps"]:
            if probe and run.is_here:
                _probe_once(resolved, device, setup)
            time = time_of(resolved, facts, setup, device, parts["steps"])
            parts["time"] = {**time, "can_be_measured": run.is_here}
    longest = rows.longest or (-(-max(fitting) // rows.sequences) if fitting else None)
    longest = None if rows.is_guessed else longest
    return _Training(parts, setup, partial(_widest, sequences=rows.sequences, longest=longest))


def _solve(run: _Run, training: _Training | None) -> dict[str, Any]:
    """What would fit. Raises UsageError where nothing can be said of it."""
    device = run.device
    if run.facts is None or training is None or training.setup is None or device.memory_bytes is None:
        raise UsageError(
            "nothing can be solved for",
            where="--solve",
            why="it needs a training whose model is known, and a device of known memory",
            fix="--device cuda --device_memory 24GiB",
        )
    limit = int(TIGHT_SHARE * device.memory_bytes)
    return solve(Situation(run.resolved, run.facts, run.folder, device, limit, training.widest_of))


def remember_run(resolved: Resolved, tokens_per_second: float) -> None:
    """Keep the speed of a run that ended, for plans of runs like it."""
    device = find_device(resolved.config.model.device)
    facts, folder = _read_model(resolved, [])
    if facts is not None:
        setup = make_setup(resolved, facts, folder, device, _widest(resolved), [])
        remember("runs", run_key(resolved, facts, setup, device), {"tokens_per_second": tokens_per_second})


def _probe_once(resolved: Resolved, device: DeviceFacts, setup: Setup) -> None:
    if read_pace(device, setup.compute, resolved) is None:
        print(f"measuring once how fast this {device.kind} trains in {setup.compute}", file=sys.stderr)
        measure_pace(resolved, device, setup.compute)


def _check_layout(resolved: Resolved, facts: ModelFacts, warnings: list[str]) -> None:
    try:
        check_dimensions(resolved.config.parallel, Decoder.of(facts.config), resolved.config.data.max_length)
    except ConfigError as error:
        warnings.append(
            f"{error.where}: {error.message}; a run refuses it" + (f" ({error.fix})" if error.fix else "")
        )


def _read_model(resolved: Resolved, warnings: list[str]) -> tuple[ModelFacts | None, Path | None]:
    name = resolved.config.model.model
    if resolved.command == "export" and (source := source_of(resolved)[0]) is not None:
        name = str(source)
        resolved.config.model.model = name
    if resolved.command == "deploy" and resolved.config.model.adapters and not name:
        name = resolved.config.model.model = base_of_adapter(resolved.config.model.adapters[0])
    if not name:
        return None, None
    entry = None if Path(name).expanduser().exists() or own_folder(name) else find_entry(name)
    if entry is not None:
        warnings += [f"--model {name}: {note}" for note in entry.notes(name)]
    try:
        found = find_model(resolved.config.model)
        if found is None and entry is not None:
            return _read_entry(entry, warnings), None
        if found is None:
            raise not_here(resolved.config.model)
        folder = found.folder
        facts = ModelFacts.read(folder)
    except SwiftError as error:
        warnings.append(error.one_line())
        return None, None
    try:
        check_model_folder(folder)
    except SwiftError as error:
        warnings.append(error.one_line())
    if resolved.command != "pt":
        derive_chat_template(resolved, name, folder)
    return facts, folder


def _read_entry(entry: ModelEntry, warnings: list[str]) -> ModelFacts | None:
    """Facts of a model that is not on this disk, from the table of short names."""
    warnings.append(f"{entry.hf_id} is not on this disk: sizes are those of the table of short names")
    try:
        return entry.facts()
    except SwiftError as error:
        warnings.append(error.one_line())
        return None


def _derive(resolved: Resolved, facts: ModelFacts | None, device: DeviceFacts, warnings: list[str]) -> None:
    """Fill in what the trainer derives from model and device."""
    taken = resolved.sources
    if facts is not None and "max_length" in taken:
        limit = facts.max_position_embeddings or DEFAULT_MAX_LENGTH
        asked = resolved.config.data.max_length
        if asked is not None and facts.max_position_embeddings and asked > limit:
            warnings.append(f"max_length {asked} is beyond the model's context of {limit} tokens")
        resolved.derive("max_length", min(limit, DEFAULT_MAX_LENGTH), "the model's context length")
    if facts is not None and "padding_free" in taken:
        derive_layout(
            resolved,
            facts.keeps_documents_apart and resolved.config.model.attn_impl in ("auto", "varlen"),
        )
    if "gradient_checkpointing" in taken:
        resolved.derive("gradient_checkpointing", device.kind != "cpu", "device")
    if resolved.config.rlhf.is_policy:
        try:
            derive_sizes(resolved, answers_in_step(resolved))
        except ConfigError as error:
            warnings.append(error.one_line())


def _look_for_files(resolved: Resolved, warnings: list[str]) -> None:
    """A warning for every adapter, callback file and (infer) row file that is not on this machine."""
    config = resolved.config
    for adapter in config.model.adapters:
        if not Path(split_name(adapter)[1]).expanduser().is_dir():
            warnings.append(f"--adapters: no such folder {adapter!r}")
    for callback in config.report.callbacks:
        if not Path(callback.partition(":")[0]).is_file():
            warnings.append(f"--callbacks: no such file {callback!r}")
    if resolved.command == "infer":
        warnings += plan_rows(resolved, config.data.val_dataset, [], None).warnings


def _steps(
    resolved: Resolved, rows: RowPlan, lengths: list[int], warnings: list[str]
) -> tuple[dict[str, Any], Widest]:
    """The steps part, and the largest micro-batch."""
    section, training = resolved.config.data, resolved.config.training
    mode = batch_mode(section)
    max_length = section.max_length or DEFAULT_MAX_LENGTH
    train_share = 1.0
    if not section.val_dataset and section.split_dataset_ratio > 0 and rows.rows > 1:
        train_share = 1 - count_validation(resolved, rows, []) / rows.rows
    num_samples = round(rows.rows * len(lengths) / len(rows.lengths) * train_share)
    longest = rows.longest or (max(lengths) if rows.sequences == 1 else None)
    known, policy = None, resolved.config.policy
    if resolved.config.rlhf.is_policy:  # rows are prompts: each gets answers, as long as they may be
        prompts, answer = answers_to_prompts(resolved)
        lengths = [-(-length // prompts) + answer for length in lengths]
        known = steps_of_prompts(policy, num_samples, answers_in_step(resolved))
        num_samples *= policy.num_generations * policy.num_iterations
    epoch = plan_epoch(
        lengths,
        max(1, num_samples),
        batch_size=training.per_device_train_batch_size,
        mode=mode,
        max_length=_row_length(resolved),
        group_by_length=section.group_by_length,
        ranks=resolved.config.parallel.data_parallel_size,
    )
    per_epoch, total, warmup = step_counts(epoch.micro_batches, training, known)
    if epoch.padding > 0.3 and mode != "packed":
        warnings.append(f"{epoch.padding:.0%} of each batch is padding: --packing true avoids it")
    mean = sum(lengths) / len(lengths)
    return {
        "layout": "packed rows"
        if mode == "packed"
        else mode.replace("_", " ").replace("padding free", "joined"),
        "unit": "rows" if mode == "packed" else "samples",
        "batch_size": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps or 1,
        "max_length": max_length,
        "micro_batches_per_epoch": epoch.micro_batches,
        "steps_per_epoch": per_epoch,
        "total": total,
        "epochs": round(total / per_epoch, 3),
        "exact": epoch.exact
        and rows.rows_exact
        and (rows.tokens_exact or section.truncation_strategy != "delete")
        and not (rows.is_guessed and mode == "packed"),
        "warmup_steps": warmup,
        "schedule": training.lr_scheduler_type,
        "learning_rate": training.learning_rate,
        "tokens_per_step": round(num_samples * mean / per_epoch),
        "largest_micro_batch_tokens": epoch.widest,
        "padding": round(epoch.padding, 4),
        "samples_per_row": round(epoch.samples_per_row, 2),
    }, _widest(resolved, rows.sequences, longest, epoch)


def _widest(
    resolved: Resolved, sequences: int = 1, longest: int | None = None, epoch: Epoch | None = None
) -> Widest:
    """The largest micro-batch; where no epoch is known, of sequences that are all as long as they may be.

    Args:
        sequences: that each sample becomes.
        longest: tokens of the longest one, None: not known.
    """
    mode, batch = batch_mode(resolved.config.data), resolved.config.training.per_device_train_batch_size
    if mode == "packed":
        count = round(batch * (epoch.samples_per_row if epoch else 1) * sequences)
        length = _row_length(resolved)
        return Widest(batch, length, count, length, batch * length - count)
    count = batch * sequences
    limit = resolved.config.data.max_length or DEFAULT_MAX_LENGTH
    prompts, answer = answers_to_prompts(resolved)
    longest_prompt = min(limit, longest or limit)
    tokens = count * (-(-longest_prompt // prompts) + answer)
    if epoch is not None and (mode == "padding_free" or sequences == 1 or longest is None):
        tokens = epoch.widest
    rows = 1 if mode == "padding_free" else min(count, tokens)
    targets = count * answer or tokens - count
    if resolved.config.task.task_type != "causal_lm":  # their ends are read
        targets = count
    shared = -(-count // prompts) if prompts > 1 else 0
    return Widest(rows, -(-tokens // rows), count, longest_prompt + answer, min(targets, tokens), shared)


def _row_length(resolved: Resolved) -> int:
    """Tokens of a packed row: a pair of answers is two sequences, each of which may be as long as a sample."""
    length = resolved.config.data.max_length or DEFAULT_MAX_LENGTH
    return length * (2 if resolved.config.rlhf.is_paired else 1)


def _parallel(resolved: Resolved, device: DeviceFacts) -> dict[str, Any]:
    section = resolved.config.parallel
    layout = Layout.of(section)
    return {
        "sizes": {
            "tensor": layout.tp,
            "pipeline": layout.pp,
            "context": layout.cp,
            "expert": layout.ep,
            "data": layout.dp,
            "shards": layout.dp_shard,
        },
        "devices_needed": layout.world_size,
        "devices_present": device.count,
        "device": device.kind,
        "layout": layout.describe(),
    }


def _model(
    resolved: Resolved,
    facts: ModelFacts | None,
    folder: Path | None,
    setup: Setup | None,
    device: DeviceFacts,
) -> dict[str, Any]:
    if facts is None:
        return {}
    return {
        "path": str(folder) if folder else None,
        "architecture": facts.architecture,
        "model_type": facts.model_type,
        "parameters": facts.num_parameters,
        "parameters_exact": facts.exact,
        "active_parameters": facts.num_active_parameters,
        "parts": dict(facts.parts),
        "trainable_parameters": setup.trainable if setup else None,
        "layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "context_length": facts.max_position_embeddings,
        "stored_dtype": facts.dtype,
        "dtype": compute_dtype(resolved, device)
        if resolved.command != "export"
        else facts.dtype or "float32",
        "quantized": _quantized(resolved),
        "weights_bytes": facts.weights_bytes,
    }


def _quantized(resolved: Resolved) -> str | None:
    """How the base is quantised when it is loaded: ``4-bit nf4``; None when it is not."""
    section = resolved.config.quantization
    if not section.is_active or resolved.command == "export":
        return None
    is_nf4 = section.quant_method == "bnb" and section.quant_bits == 4
    return f"{section.quant_bits}-bit {section.bnb_4bit_quant_type if is_nf4 else section.quant_method}"
