"""From a configuration to a trained model: check, load, build, train, leave everything in the run folder."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swift.config.bind import dump_text
from swift.config.schema import Resolved
from swift.core.devices import describe_devices, pick_device, pick_dtype
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import atomic_write_text, free_bytes
from swift.core.format import format_bytes
from swift.core.logging import attach_run_logs, detach_run_logs, get_logger
from swift.data.batching import BatchSchedule
from swift.data.collate import collate
from swift.data.load import LoadedData, load_data
from swift.data.loader import BatchLoader
from swift.data.mode import batch_mode, derive_layout
from swift.data.sources import find_files, parse_dataset_spec
from swift.models.facts import ModelFacts
from swift.models.liger import apply_liger_kernels
from swift.models.load import check_vocabulary, isolates_documents, load_model, load_template
from swift.objectives.sft import SftObjective
from swift.parallel.engine import ParameterSet
from swift.parallel.isolation import check_isolation
from swift.parallel.native import NativeEngine
from swift.runs.curves import draw_curves
from swift.runs.folder import RunFolder
from swift.runs.metrics import MetricsLog
from swift.runs.record import write_environment, write_provenance, write_summary
from swift.runs.status import StatusFile
from swift.train.callbacks.base import Callback
from swift.train.callbacks.trackers import check_trackers, tracker_callbacks
from swift.train.callbacks.user import load_callbacks
from swift.train.checkpoints import checkpoint_bytes, load_checkpoint, read_state, save_checkpoint
from swift.train.config_record import recorded
from swift.train.evaluation import LossEvaluator
from swift.train.inspection import inspection_report
from swift.train.loop import Interrupted, StepPlan, Trainer
from swift.train.neftune import add_embedding_noise
from swift.train.optimizers import build_optimizer
from swift.train.precision import check_precision, export_dtype, param_dtype
from swift.train.preflight import find_checkpoint, preflight
from swift.train.schedules import learning_rate_schedule
from swift.train.state import TrainState
from swift.tuners.apply import TunedModel, apply_tuner
from swift.tuners.peft_format import adapter_folder, load_adapter

__all__ = ["RunResult", "train"]

logger = get_logger(__name__)

DEFAULT_MAX_LENGTH = 2048


@dataclass
class RunResult:
    """What a finished run left: its folder and the contents of summary.json."""

    folder: Path
    summary: dict[str, Any]


@dataclass
class _Prepared:
    """Everything that is known before the model's weights are read."""

    resolved: Resolved
    model_path: Path
    checkpoint: Path | None
    device: torch.device
    dtype: torch.dtype
    export_dtype: torch.dtype
    template: Any
    data: LoadedData
    schedule: BatchSchedule
    plan: StepPlan

    def sample_lengths(self) -> list[int]:
        """Tokens of each training sample, then of those that split_dataset_ratio set aside."""
        lengths: list[int] = self.data.train.lengths.tolist()
        if self.data.validation is not None and not self.resolved.config.data.val_dataset:
            lengths += self.data.validation.lengths.tolist()
        return lengths


def train(
    resolved: Resolved,
    *,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = print,
    arguments: Sequence[str] | None = None,
    announce: Callable[[Sequence[int]], None] | None = None,
) -> RunResult:
    """Run ``pt`` or ``sft`` as configured.

    Args:
        resolved: from `swift.config.bind.resolve`; derived values are filled in.
        callbacks: in addition to those the configuration names (the command line adds its progress line).
        say: receives the few lines meant for the terminal.
        arguments: the command line, for provenance.json.
        announce: called with the token length of every sample before the weights are read.

    Raises:
        SwiftError: with cause and fix; bad options, model or data are found before anything slow.
        Interrupted: stopped by a signal, after saving.
    """
    _refuse_import_by_worker()
    own_callbacks = load_callbacks(resolved.config.report.callbacks)
    prepared = _prepare(resolved)
    if announce is not None:
        announce(prepared.sample_lengths())
    resumed_step = read_state(prepared.checkpoint).step if prepared.checkpoint else 0
    folder = _open_folder(resolved, prepared.checkpoint)
    status = StatusFile(folder.path, total_steps=prepared.plan.total_steps)
    closing = contextlib.ExitStack()  # closed in reverse: the log and the lock last
    closing.callback(folder.release)
    closing.callback(detach_run_logs)
    closing.callback(gc.unfreeze)
    try:
        attach_run_logs(folder.path)
        status.start_heartbeat()
        _record(folder, prepared, arguments)
        for note in prepared.data.notes:
            logger.warning(note)
            say(note)
        status.update(stage="load model")
        everyone = [*callbacks, *tracker_callbacks(resolved.config.report.report_to), *own_callbacks]
        for callback in everyone:
            closing.callback(callback.close)
        trainer = _build(prepared, folder, status, everyone, say, closing)
        if resumed_step:
            say(f"going on from {prepared.checkpoint} (step {resumed_step} of {prepared.plan.total_steps})")
        gc.freeze()  # what is loaded by now stays to the end and need not be searched for garbage
        gc.enable()
        summary = {"folder": str(folder.path), "command": resolved.command, **trainer.train()}
        write_summary(folder.path, summary)
        _draw_curves(folder.path)
        for callback in trainer.callbacks:
            callback.on_train_end(trainer, summary)
        status.finish("succeeded")
        return RunResult(folder.path, summary)
    except (Interrupted, KeyboardInterrupt) as stop:
        status.finish("stopped", str(stop))
        raise
    except BaseException as error:  # whatever ended the run, its status must say so
        logger.error("the run failed", exc_info=not isinstance(error, SwiftError))
        status.finish("failed", str(error))
        raise
    finally:
        closing.close()


def _refuse_import_by_worker() -> None:
    """A worker process imports the main script once more; a script without a guard would train in every worker."""
    if getattr(
        multiprocessing.current_process(), "_inheriting", False
    ):  # as multiprocessing itself finds out
        raise SwiftError(
            "training was started while a worker process imports your script",
            fix="put the call under `if __name__ == '__main__':`",
        )


def _draw_curves(folder: Path) -> None:
    """A picture that cannot be written must not turn a trained model into a failed run."""
    try:
        draw_curves(folder)
    except OSError as error:
        logger.warning("curves.png could not be written: %s", error)


def _prepare(resolved: Resolved) -> _Prepared:
    """Check and resolve everything that needs no weights; the cheapest checks come first."""
    config = resolved.config
    model_path = preflight(resolved)
    check_trackers(config.report.report_to)
    checkpoint = find_checkpoint(resolved)
    facts = ModelFacts.read(model_path)
    limit = facts.max_position_embeddings or DEFAULT_MAX_LENGTH
    resolved.derive("max_length", min(limit, DEFAULT_MAX_LENGTH), "the model's context length")
    device = pick_device(config.model.device)
    _limit_device_memory(device)
    if config.training.use_liger_kernel and device.type != "cuda":
        raise ConfigError(
            "liger kernels need a CUDA device", where="--use_liger_kernel", fix="leave the option out"
        )
    dtype = pick_dtype(config.model.torch_dtype, device)
    check_precision(resolved, dtype)
    resolved.derive("gradient_checkpointing", device.type != "cpu", "device")
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
    resolved.derive("num_threads", threads, "OMP_NUM_THREADS or the cores")
    torch.set_num_threads(config.training.num_threads or threads)
    template = load_template(
        model_path,
        config.template,
        pretraining=resolved.command == "pt",
        trust_remote_code=config.model.trust_remote_code,
    )
    if template.chat is not None and config.template.chat_template:
        # Checkpoints carry the template they were trained with, so that other programs use it as well.
        template.tokenizer.chat_template = template.chat.source
    assert config.data.max_length is not None
    data = load_data(resolved, template, config.data.max_length)
    derive_layout(
        resolved,
        isolates_documents(
            model_path, config.model.attn_impl, trust_remote_code=config.model.trust_remote_code
        ),
    )
    schedule = BatchSchedule(
        data.train.lengths,
        batch_size=config.training.per_device_train_batch_size,
        mode=batch_mode(config.data),
        max_length=config.data.max_length,
        group_by_length=config.data.group_by_length,
        shuffle=config.data.dataset_shuffle,
        seed=config.data.data_seed or 0,
    )
    return _Prepared(
        resolved,
        model_path,
        checkpoint,
        device,
        dtype,
        export_dtype(facts, dtype),
        template,
        data,
        schedule,
        _step_plan(resolved, schedule),
    )


def _limit_device_memory(device: torch.device) -> None:
    """Keep to the share of a CUDA device that the experiment service gave this job."""
    share = os.environ.get("SWIFT_DEVICE_MEMORY_BYTES")
    if share and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, int(share) / total), device)


def _step_plan(resolved: Resolved, schedule: BatchSchedule) -> StepPlan:
    training = resolved.config.training
    accumulation = training.gradient_accumulation_steps or 1
    steps_per_epoch = schedule.num_steps(accumulation)
    total = (
        training.max_steps
        if training.max_steps > 0
        else math.ceil(training.num_train_epochs * steps_per_epoch)
    )
    return StepPlan(total, steps_per_epoch, accumulation)


def _open_folder(resolved: Resolved, checkpoint: Path | None) -> RunFolder:
    """A resumed run continues its own folder; a new one gets a folder of its own."""
    if checkpoint is not None:
        return RunFolder.open(checkpoint.parent, write=True)
    options = resolved.config.checkpoint
    return RunFolder.create(options.output_dir, options.run_name)


def _record(folder: RunFolder, prepared: _Prepared, arguments: Sequence[str] | None) -> None:
    config_file = folder.path / "config.yaml"
    # A resumed run may have other options (a larger max_steps): the next resume must know them.
    atomic_write_text(config_file, dump_text(recorded(prepared.resolved), shlex.quote(str(config_file))))
    if prepared.checkpoint is None:
        rows = prepared.data.validation_rows
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        atomic_write_text(folder.path / "val_dataset.jsonl", text)
    write_environment(folder.path, describe_devices())
    data = prepared.resolved.config.data
    names = [*data.dataset, *data.val_dataset]
    write_provenance(
        folder.path,
        prepared.resolved,
        arguments=arguments,
        data_files=[file for name in names for file in find_files(parse_dataset_spec(name).path)],
        model_path=prepared.model_path,
        extra={
            "template": prepared.template.fingerprint,
            "resumed_from": str(prepared.checkpoint) if prepared.checkpoint else None,
            "training_data": asdict(prepared.data.train.report),
        },
    )


def _build(
    prepared: _Prepared,
    folder: RunFolder,
    status: StatusFile,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    closing: contextlib.ExitStack,
) -> Trainer:
    """Model, engine and trainer, ready for the next step; ``closing`` gets what must be closed in the end."""
    resolved, config, device = prepared.resolved, prepared.resolved.config, prepared.device
    checkpoint, tokenizer = prepared.checkpoint, prepared.template.tokenizer
    tuned = _tune(_load_weights(prepared), resolved, prepared.dtype)
    engine = _engine(prepared, tuned)
    if prepared.schedule.mode != "padded":
        check_isolation(engine)
    state = load_checkpoint(checkpoint, tuned=tuned, engine=engine) if checkpoint else TrainState()
    cursor = _cursor_fingerprint(prepared)
    if state.cursor_fingerprint not in ("", cursor):
        raise SwiftError(
            "the data or its batching changed since the checkpoint, so the run cannot go on exactly",
            where=str(checkpoint),
            why="data rows, max_length, batch size, accumulation, packing, seed or grouping differ",
            fix="restore them, or start a new run from these weights with --adapters or --model",
        )
    state.cursor_fingerprint = cursor
    only_model = config.checkpoint.save_only_model
    _check_disk(folder.path, tuned, only_model)
    pad_token_id = tokenizer.pad_token_id
    if config.training.neftune_noise_alpha:
        add_embedding_noise(engine, config.training.neftune_noise_alpha, pad_token_id)
    if device.type != "cpu":
        rows = prepared.schedule.largest_micro_batch()
        engine.rehearse(
            collate(prepared.data.train, rows, prepared.schedule.mode, pad_token_id), SftObjective()
        )
    loader = BatchLoader(
        prepared.data.train,
        prepared.schedule,
        num_workers=config.data.dataloader_num_workers,
        pad_token_id=pad_token_id,
    )
    closing.callback(loader.close)
    if config.report.debug_mode:
        batch = next(iter(loader.steps(0, prepared.plan.accumulation)))[0].to(device)
        say(inspection_report(tuned.model, batch, tokenizer))
    if checkpoint is not None:
        _set_aside(folder, state, say)
    metrics = MetricsLog(folder.path / "metrics.jsonl")
    closing.callback(metrics.close)
    metrics.truncate_after(state.step)

    def save(path: Path, at: TrainState) -> None:
        save_checkpoint(
            path,
            tuned=tuned,
            tokenizer=tokenizer,
            base_path=prepared.model_path,
            export_dtype=prepared.export_dtype,
            engine=engine,
            state=at,
            config_file=folder.path / "config.yaml",
            only_model=only_model,
        )

    return Trainer(
        resolved=resolved,
        folder=folder,
        engine=engine,
        objective=SftObjective(),
        loader=loader,
        plan=prepared.plan,
        state=state,
        save=save,
        metrics=metrics,
        status=status,
        device=device,
        evaluator=_evaluator(prepared, pad_token_id),
        callbacks=callbacks,
    )


def _set_aside(folder: RunFolder, state: TrainState, say: Callable[[str], None]) -> None:
    """Put checkpoints after ``state.step`` out of the way; ``best`` and ``last`` are those of that step again."""
    stale = folder.set_aside_after(state.step)
    for path in stale:
        say(f"{path.name} is set aside: the run goes on from step {state.step} without it")
    if stale:
        folder.mark("last", state.step)
        if state.best_step is not None and folder.checkpoint_path(state.best_step) in folder.checkpoints():
            folder.mark("best", state.best_step)


def _load_weights(prepared: _Prepared) -> Any:
    """The base model; a full run that goes on takes the weights of its checkpoint."""
    config = prepared.resolved.config
    resumes_full = prepared.checkpoint is not None and config.tuner.tuner_type == "full"
    folder = prepared.checkpoint if resumes_full and prepared.checkpoint else prepared.model_path
    # Full training starts from the exact weights: through the computing precision they would be rounded once.
    dtype = param_dtype(prepared.resolved) if config.tuner.tuner_type == "full" else prepared.dtype
    model = load_model(
        folder,
        dtype=dtype,
        device=prepared.device,
        attention=config.model.attn_impl,
        trust_remote_code=config.model.trust_remote_code,
    )
    check_vocabulary(model, prepared.template.tokenizer, folder)
    if config.training.use_liger_kernel:
        apply_liger_kernels(model)
    return model


def _tune(model: Any, resolved: Resolved, dtype: torch.dtype) -> TunedModel:
    """Attach the tuner, store frozen weights in the computing precision, switch on checkpointing."""
    config = resolved.config
    if config.model.adapters:
        if len(config.model.adapters) > 1 or config.tuner.tuner_type != "lora":
            raise ConfigError(
                "training goes on from one LoRA adapter", where="--adapters", fix="name one adapter"
            )
        tuned = load_adapter(model, adapter_folder(config.model.adapters[0]), trainable=True)
    else:
        tuned = apply_tuner(model, config.tuner, seed=config.training.seed, param_dtype=param_dtype(resolved))
        for parameter in model.parameters():
            if not parameter.requires_grad and tuned.kind == "full":
                parameter.data = parameter.data.to(dtype)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tuned


def _engine(prepared: _Prepared, tuned: TunedModel) -> NativeEngine:
    training = prepared.resolved.config.training
    assert training.learning_rate is not None
    total = prepared.plan.total_steps
    warmup = training.warmup_steps
    schedule = learning_rate_schedule(
        training.lr_scheduler_type,
        peak=training.learning_rate,
        total_steps=total,
        warmup_steps=math.ceil(total * training.warmup_ratio) if warmup is None else warmup,
        min_ratio=training.min_lr_ratio,
        decay_ratio=training.lr_decay_ratio,
    )
    sets = [
        ParameterSet(
            name,
            parameters,
            build_optimizer(parameters, training, prepared.device),
            schedule,
            training.max_grad_norm,
        )
        for name, parameters in tuned.parameter_sets().items()
    ]
    return NativeEngine(
        tuned.model,
        sets,
        device=prepared.device,
        dtype=prepared.dtype,
        chunk_size=training.logits_chunk_size,
        compile_model=training.torch_compile,
    )


def _evaluator(prepared: _Prepared, pad_token_id: int) -> LossEvaluator | None:
    config, dataset = prepared.resolved.config, prepared.data.validation
    if dataset is None:
        return None
    size = config.evaluation.per_device_eval_batch_size or config.training.per_device_train_batch_size
    return LossEvaluator(dataset, batch_size=size, pad_token_id=pad_token_id)


def _cursor_fingerprint(prepared: _Prepared) -> str:
    """What the data cursor (epoch, step in epoch) refers to: rows, batching and order."""
    config = prepared.resolved.config
    parts = (
        config.training.per_device_train_batch_size,
        prepared.plan.accumulation,
        prepared.schedule.mode,
        config.data.max_length,
        config.data.group_by_length,
        config.data.dataset_shuffle,
        config.data.data_seed,
    )
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=12)
    digest.update(prepared.data.train.lengths.tobytes())
    return digest.hexdigest()


def _check_disk(folder: Path, tuned: TunedModel, only_model: bool) -> None:
    """Refuse a run whose first checkpoint cannot fit; better now than after hours."""
    needed, free = checkpoint_bytes(tuned, only_model=only_model), free_bytes(folder)
    if needed > free:
        raise SwiftError(
            f"a checkpoint needs about {format_bytes(needed)}, {format_bytes(free)} are free",
            where=str(folder),
            fix="free some space, choose another --output_dir, or --save_only_model",
        )
