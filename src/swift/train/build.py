"""Model, engine and trainer from what `prepare` found out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import free_bytes
from swift.core.format import format_bytes
from swift.data.collate import collate
from swift.data.loader import BatchLoader
from swift.data.stream import StreamLoader
from swift.data.tokens import TokenDataset
from swift.models.liger import apply_liger_kernels
from swift.models.load import check_vocabulary, load_model
from swift.models.streamed import empty_model
from swift.objectives.base import Objective
from swift.objectives.policy.objective import PolicyObjective
from swift.objectives.pooled import PooledObjective
from swift.parallel.answers import AnswerEngine
from swift.parallel.isolation import check_isolation
from swift.parallel.native import NativeEngine
from swift.runs.folder import RunFolder
from swift.runs.metrics import MetricsLog
from swift.runs.status import StatusFile
from swift.train.assemble import make_engine, make_objective, tune_model
from swift.train.callbacks.base import Callback
from swift.train.callbacks.lisa import LisaCallback
from swift.train.checkpoints import (
    MASTER_FILE,
    PendingSave,
    checkpoint_bytes,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from swift.train.config_record import recorded_dataset
from swift.train.evaluation import Evaluator, Evaluators, LossEvaluator
from swift.train.inspection import inspection_report
from swift.train.loop import PolicyLoader, Trainer
from swift.train.neftune import add_embedding_noise
from swift.train.precision import param_dtype
from swift.train.prepare import Prepared, pieces_asked
from swift.train.reference import precompute, reference_options
from swift.train.shared_base import SharedBase
from swift.train.starts import start_from_data
from swift.train.state import TrainState
from swift.train.task_evaluation import TaskEvaluator
from swift.train.tasks import classifier_head
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel
from swift.tuners.starts import needs_data

__all__ = ["PolicyFactory", "PolicyParts", "build", "check_place_in_data", "load_weights"]


class PolicyParts(Protocol):
    """What policy optimisation brings along: `swift.rl` makes it, training knows no more of it than this.

    Attributes:
        objective: the policy loss.
        loader: samples answers and deals them out as batches.
        evaluator: of validation prompts, or None.
        callbacks: what has to be done between steps.
        save: writes what is needed to go on into a checkpoint folder; all ranks call it, all but rank 0 with None.
    """

    @property
    def objective(self) -> PolicyObjective: ...
    @property
    def loader(self) -> PolicyLoader: ...
    @property
    def evaluator(self) -> Evaluator | None: ...
    @property
    def callbacks(self) -> Sequence[Callback]: ...
    @property
    def save(self) -> Callable[[Path | None], None]: ...


PolicyFactory = Callable[..., PolicyParts]
"""(prepared, engine, (parameters, copies) of a reference that moves, folder, status, what is to be closed)."""


def build(
    prepared: Prepared,
    folder: RunFolder,
    status: StatusFile,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    closing: contextlib.ExitStack,
    evaluators: Sequence[Callable[[Prepared], Evaluator]] = (),
    policy: PolicyFactory | None = None,
    base: SharedBase | None = None,
) -> Trainer:
    """Model, engine and trainer, ready for the next step.

    ``closing`` gets what must be closed in the end; ``evaluators`` make what is measured beside the validation loss;
    ``policy`` makes what policy optimisation learns from; ``base`` is the model where it is shared with other runs.
    """
    resolved, config = prepared.resolved, prepared.resolved.config
    tokenizer = prepared.template.tokenizer
    pad_token_id: int = tokenizer.pad_token_id
    tuned, reference = _tuned(prepared, base, closing)
    engine = _engine(prepared, tuned, reference, base)
    state = _restored(prepared, engine)
    if config.rlhf.precompute_ref_log_probs:
        assert isinstance(engine, AnswerEngine)
        precompute(prepared, engine, say)
    if prepared.world.is_main:
        _check_disk(folder.path, tuned, config.checkpoint.save_only_model)
    if config.training.neftune_noise_alpha:
        add_embedding_noise(engine, config.training.neftune_noise_alpha, pad_token_id)
    parts: PolicyParts | None = None
    if policy is not None:
        parts = policy(prepared, engine, _moving_reference(prepared, engine), folder, status, closing)
    objective: Objective = parts.objective if parts else _objective(prepared, validation=False)
    if prepared.device.type != "cpu" and parts is None:
        rows = prepared.schedule.largest_micro_batch()
        engine.rehearse(collate(prepared.data.train, rows, prepared.schedule.mode, pad_token_id), objective)
    loader = parts.loader if parts else _loader(prepared, pad_token_id)
    closing.callback(loader.close)
    if config.report.debug_mode and not parts:
        batch = next(iter(loader.steps(0, prepared.plan.accumulation)))[0].to(prepared.device)
        say(inspection_report(tuned.model, batch, tokenizer))
    if prepared.checkpoint is not None:
        _set_aside(folder, state, say)
    metrics = MetricsLog(folder.path / "metrics.jsonl")
    closing.callback(metrics.close)
    metrics.truncate_after(state.step)
    return Trainer(
        resolved=resolved,
        folder=folder,
        engine=engine,
        objective=objective,
        loader=loader,
        plan=prepared.plan,
        state=state,
        save=partial(_save, prepared, folder, tuned, engine, parts.save if parts else None),
        metrics=metrics,
        status=status,
        device=prepared.device,
        evaluator=_evaluator(prepared, pad_token_id, [make(prepared) for make in evaluators], parts),
        group_names=_metric_names(prepared, objective),
        world=prepared.world,
        # What adds metrics to a line comes before those who read it.
        callbacks=[*(parts.callbacks if parts else ()), *callbacks, *_own_callbacks(resolved, tuned, engine)],
    )


def _tuned(
    prepared: Prepared, base: SharedBase | None, closing: contextlib.ExitStack
) -> tuple[TunedModel, dict[str, Any]]:
    """The model with its tuner, as the checkpoint has it, and its reference, which is as it was when the run began."""
    config, checkpoint, name = prepared.resolved.config, prepared.checkpoint, DEFAULT_ADAPTER
    if base is None:
        model = load_weights(prepared)
    else:
        name = base.new_name()
        closing.callback(base.remove, name)
        model = base.weights(prepared, load_weights)
    # LoftQ's start is the reference of preference learning, whatever the adapter has become since.
    needs_start = config.rlhf.rlhf_type is not None and config.tuner.init_weights == "loftq"
    tuned = tune_model(
        model,
        prepared.resolved,
        device=prepared.device,
        dtype=prepared.dtype,
        total_steps=prepared.plan.total_steps,
        base=prepared.model_path,
        restored=checkpoint is not None and not needs_start,
        name=name,
    )
    reference = reference_options(prepared, tuned) if config.rlhf.rlhf_type else {}
    if checkpoint is not None:
        load_checkpoint(checkpoint, tuned=tuned)
    return tuned, reference


def _engine(
    prepared: Prepared, tuned: TunedModel, reference: dict[str, Any], base: SharedBase | None
) -> NativeEngine:
    """The engine, whose model keeps documents apart and has the start that is made with it."""
    config, tokenizer = prepared.resolved.config, prepared.template.tokenizer
    engine = make_engine(
        tuned,
        prepared.resolved,
        device=prepared.device,
        dtype=prepared.dtype,
        total_steps=prepared.plan.total_steps,
        tokenizer=tokenizer,
        world=prepared.world,
        weights=_weights_folder(prepared),
        shared=base.division if base is not None else None,
        **reference,
    )
    if prepared.schedule.mode != "padded":
        check_isolation(engine)
    if prepared.checkpoint is None and needs_data(config.tuner.init_weights) and not config.model.adapters:
        name = tuned.adapter or DEFAULT_ADAPTER
        start_from_data(engine, prepared.data.train, prepared.resolved, tokenizer.pad_token_id, name)
    return engine


def _moving_reference(prepared: Prepared, engine: NativeEngine) -> tuple[Any, ...] | None:
    """Trained weights and their copies that follow them; None where the reference stays."""
    if not prepared.resolved.config.policy.sync_ref_model:
        return None
    assert isinstance(engine, AnswerEngine) and isinstance(engine.reference, partial)
    return engine.reference.args[:2]


def _restored(prepared: Prepared, engine: NativeEngine) -> TrainState:
    """The state of the checkpoint (its optimizer is loaded), or of a beginning."""
    checkpoint = prepared.checkpoint
    state = TrainState()
    if checkpoint is not None:
        state = read_state(checkpoint)
        engine.load(checkpoint)
    state.cursor_fingerprint = _cursor_fingerprint(prepared)
    state.order_batch_size = prepared.schedule.batch_size
    state.step_size = prepared.plan.accumulation // prepared.schedule.split
    # A part that goes on with steps of another number of processes leaves that number to the next one.
    if not state.data_ranks or prepared.plan.accumulation == pieces_asked(prepared.resolved.config):
        state.data_ranks = prepared.world.layout.dp
    return state


def _loader(prepared: Prepared, pad_token_id: int) -> StreamLoader | BatchLoader:
    share = (prepared.world.data_rank, prepared.world.layout.dp)
    if prepared.stream is not None:
        return StreamLoader(prepared.stream, pad_token_id=pad_token_id, share=share)
    return BatchLoader(
        prepared.data.train,
        prepared.schedule,
        num_workers=prepared.resolved.config.data.dataloader_num_workers,
        pad_token_id=pad_token_id,
        share=share,
    )


def _save(
    prepared: Prepared,
    folder: RunFolder,
    tuned: TunedModel,
    engine: NativeEngine,
    also: Callable[[Path | None], None] | None,
    path: Path,
    at: TrainState,
) -> PendingSave:
    return save_checkpoint(
        path,
        tuned=tuned,
        tokenizer=prepared.template.tokenizer,
        base_path=prepared.model_path,
        export_dtype=prepared.export_dtype,
        engine=engine,
        state=at,
        config_file=path.parent / "config.yaml",
        only_model=prepared.resolved.config.checkpoint.save_only_model,
        also=also,
        world=prepared.world,
    )


def _own_callbacks(resolved: Resolved, tuned: TunedModel, engine: NativeEngine) -> list[Callback]:
    """What the tuner itself has to do between steps."""
    tuner = resolved.config.tuner
    if not tuner.lisa_activated_layers:
        return []
    optimizer = engine.parameter_sets["default"].optimizer
    return [
        LisaCallback(
            tuned.model,
            optimizer,
            activated=tuner.lisa_activated_layers,
            interval=tuner.lisa_step_interval,
            seed=resolved.config.training.seed,
        )
    ]


def _set_aside(folder: RunFolder, state: TrainState, say: Callable[[str], None]) -> None:
    """Put checkpoints after ``state.step`` out of the way; ``best`` and ``last`` are those of that step again."""
    stale = folder.set_aside_after(state.step)
    for path in stale:
        say(f"{path.name} is set aside: the run goes on from step {state.step} without it")
    if stale:
        folder.mark("last", state.step)
        if state.best_step is not None and folder.checkpoint_path(state.best_step) in folder.checkpoints():
            folder.mark("best", state.best_step)


def _weights_folder(prepared: Prepared) -> Path:
    """Where the base model's weights are; a full run that goes on takes those of its checkpoint."""
    resumes_full = prepared.checkpoint is not None and prepared.resolved.config.tuner.trains_whole_model
    return prepared.checkpoint if resumes_full and prepared.checkpoint else prepared.model_path


def _without_weights(prepared: Prepared, folder: Path, dtype: torch.dtype) -> Any:
    """The model before its weights, when every rank can read its own shards of them later; None when it cannot."""
    config, layout, tuner = prepared.resolved.config, prepared.world.layout, prepared.resolved.config.tuner
    if layout.dp_shard * layout.tp * layout.pp == 1 or config.model.trust_remote_code:
        return None
    if tuner.modules_to_save or config.model.adapters or tuner.init_weights not in ("default", "gaussian"):
        return None
    if config.task.task_type != "causal_lm" or config.task.has_score_head or config.rlhf.rlhf_type == "rm":
        return None
    if config.rlhf.rlhf_type is not None and tuner.trains_whole_model and not config.rlhf.reference_free:
        return None  # the reference may be a copy of the weights, made before the model is divided
    if (folder / MASTER_FILE).is_file():  # what one process has saved beside the rounded weights
        return None
    return empty_model(
        folder,
        dtype=dtype,
        attention=config.model.attn_impl,
        device=str(prepared.device),
        quantization=config.quantization,
    )


def load_weights(prepared: Prepared) -> Any:
    """The base model; a full run that goes on takes the weights of its checkpoint."""
    config = prepared.resolved.config
    folder = _weights_folder(prepared)
    # Full training starts from the exact weights: through the computing precision they would be rounded once.
    dtype = param_dtype(prepared.resolved) if config.tuner.trains_whole_model else prepared.dtype
    model = _without_weights(prepared, folder, dtype)
    if model is None:
        # Of a model in shards only those go to the device; kernels of a device are tried before it is divided.
        whole = prepared.world.layout.dp_shard == 1 or config.training.use_liger_kernel
        model = load_model(
            folder,
            dtype=dtype,
            device=prepared.device if whole else "cpu",
            attention=config.model.attn_impl,
            trust_remote_code=config.model.trust_remote_code,
            quantization=config.quantization,
            head=classifier_head(prepared.resolved),
        )
    check_vocabulary(model, prepared.template.tokenizer, folder)
    if config.task.has_score_head:  # transformers finds the last token of a padded row by it
        model.config.pad_token_id = prepared.template.tokenizer.pad_token_id
    if config.training.use_liger_kernel:
        apply_liger_kernels(model, experts=prepared.world.layout.ep == 1)
    return model


def _evaluator(
    prepared: Prepared, pad_token_id: int, others: Sequence[Evaluator], parts: PolicyParts | None
) -> Evaluator | None:
    if parts is not None:
        every = [one for one in (parts.evaluator, *others) if one is not None]
        return Evaluators(every) if every else None
    if prepared.data.validation is None:
        return Evaluators(others) if others else None
    own = _validation(prepared, prepared.data.validation, pad_token_id)
    return Evaluators([own, *others]) if others else own


def _validation(prepared: Prepared, dataset: TokenDataset, pad_token_id: int) -> Evaluator:
    config = prepared.resolved.config
    size = config.evaluation.per_device_eval_batch_size or config.training.per_device_train_batch_size
    objective = _objective(prepared, validation=True)
    if isinstance(objective, PooledObjective):
        return TaskEvaluator(
            dataset, batch_size=size, pad_token_id=pad_token_id, objective=objective, world=prepared.world
        )
    return LossEvaluator(
        dataset,
        batch_size=size,
        pad_token_id=pad_token_id,
        objective=objective,
        group_names=_metric_names(prepared, objective),
        world=prepared.world,
    )


def _objective(prepared: Prepared, *, validation: bool) -> Objective:
    channels = prepared.data.channels
    return make_objective(
        prepared.resolved, channels[1 if validation else 0] if channels else None, validation=validation
    )


def _metric_names(prepared: Prepared, objective: Objective) -> tuple[str, ...]:
    """Of the sums that the objective gives beside its loss."""
    if isinstance(objective, PooledObjective | PolicyObjective):
        return objective.metric_names
    return tuple(f"loss_{name}" for name in prepared.data.channels[0].names) if prepared.data.channels else ()


def check_place_in_data(prepared: Prepared) -> None:
    """Raise SwiftError when the checkpoint's place in the data means another one by now, or is behind the end."""
    checkpoint = prepared.checkpoint
    if checkpoint is None:
        return
    state, total = read_state(checkpoint), prepared.plan.total_steps
    if state.step > total:  # else its config.yaml would say less than was trained
        raise ConfigError(
            f"{state.step} steps are done already, {total} are asked for",
            where=str(checkpoint),
            fix=f"--max_steps with more than {state.step}, or resume an earlier checkpoint-N of the run",
        )
    if state.cursor_fingerprint in ("", _cursor_fingerprint(prepared)):
        return
    raise SwiftError(
        "the data or its batching changed since the checkpoint, so the run cannot go on exactly",
        where=str(checkpoint),
        why="data rows, max_length, batch size, accumulation, packing, seed or grouping differ",
        fix="restore them, or start a new run from these weights with --adapters or --model",
    )


def _cursor_fingerprint(prepared: Prepared) -> str:
    """What the data cursor (epoch, step in epoch) refers to: rows, batching and order."""
    config = prepared.resolved.config
    batching: tuple[Any, ...] = (
        prepared.schedule.batch_size,
        prepared.plan.accumulation // prepared.schedule.split,
    )
    if config.rlhf.is_policy:  # prompts follow one another, whatever the micro-batches of their answers are
        policy = config.policy
        batching = (policy.generation_batch_size, policy.num_generations, policy.num_iterations)
    parts: tuple[Any, ...] = (
        *batching,
        prepared.schedule.mode,
        config.data.max_length,
        config.data.group_by_length,
        config.data.dataset_shuffle,
        config.data.data_seed,
    )
    if config.data.streaming:
        data = config.data
        # By the names that config.yaml has: a run begun with a relative path is resumed with the absolute one.
        names = [recorded_dataset(name) for name in data.dataset]
        parts = (*parts, names, data.dataset_weights, data.shuffle_buffer_size, data.stopping_strategy)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=12)
    digest.update(prepared.data.train.lengths.tobytes())
    if (
        prepared.stream is not None
    ):  # the lengths are those of the first window; the sizes tell of what follows
        sizes = [[file.stat().st_size for file in files] for files in prepared.stream.files]
        digest.update(repr(sizes).encode())
    return digest.hexdigest()


def _check_disk(folder: Path, tuned: TunedModel, only_model: bool) -> None:
    """Refuse a run whose first checkpoint cannot fit; better now than after hours."""
    needed, free = checkpoint_bytes(tuned, only_model=only_model), free_bytes(folder)
    if needed > free:
        raise SwiftError(
            f"a checkpoint needs about {format_bytes(needed)}, {format_bytes(free)} are free",
            where=str(folder),
            fix="free some space, choose another --output_dir, or --save_only_model",
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
