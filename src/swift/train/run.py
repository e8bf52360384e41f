"""From a configuration to a trained model: check, load, build, train, leave everything in the run folder.

`run_steps` is the whole life of a run as a generator that asks for the gradients of its optimizer steps. `train` has
them computed by the run's own engine; `swift.train.fused` runs several beside each other on one base model.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import shlex
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swift.config.bind import dump_text
from swift.config.schema import Resolved
from swift.core.devices import describe_devices, pick_device
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import atomic_write_text
from swift.core.logging import attach_run_logs, detach_run_logs, get_logger
from swift.data.sources import find_files, parse_dataset_spec
from swift.data.stream import stream_notes
from swift.parallel.engine import StepOutput
from swift.parallel.launch import note_run_folder, restart_folder
from swift.parallel.layout import Layout
from swift.parallel.world import World, join
from swift.runs.curves import draw_curves
from swift.runs.folder import RankFolder, RunFolder
from swift.runs.record import write_environment, write_provenance, write_summary
from swift.runs.status import StatusFile
from swift.train.build import PolicyFactory, build, check_place_in_data
from swift.train.callbacks.base import Callback
from swift.train.callbacks.trackers import tracker_callbacks
from swift.train.callbacks.user import load_callbacks
from swift.train.checkpoints import read_state
from swift.train.config_record import recorded
from swift.train.evaluation import Evaluator
from swift.train.failures import failure_kind
from swift.train.loop import Interrupted
from swift.train.prepare import Prepared, prepare
from swift.train.shared_base import SharedBase
from swift.train.signals import StopSignals
from swift.train.step import Step, drive

__all__ = ["RunResult", "run_steps", "train"]

logger = get_logger(__name__)


@dataclass
class RunResult:
    """What a finished run left: its folder and the contents of summary.json."""

    folder: Path
    summary: dict[str, Any]


def train(
    resolved: Resolved,
    *,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = print,
    arguments: Sequence[str] | None = None,
    announce: Callable[[Sequence[int]], None] | None = None,
    evaluators: Sequence[Callable[[Prepared], Evaluator]] | None = None,
    policy: PolicyFactory | None = None,
) -> RunResult:
    """Run ``pt``, ``sft`` or ``rlhf`` as configured.

    Args:
        resolved: from `swift.config.bind.resolve`; derived values are filled in.
        callbacks: in addition to those the configuration names (the command line adds its progress line).
        say: receives the few lines meant for the terminal.
        arguments: the command line, for provenance.json.
        announce: called with the token length of every sample before the weights are read.
        evaluators: make what is measured beside the validation loss (`swift.evaluate.training.suite_evaluators`).
        policy: makes what policy optimisation samples and learns from (`swift.rl.run`).

    Raises:
        SwiftError: with cause and fix; bad options, model or data are found before anything slow.
        Interrupted: stopped by a signal, after saving.
    """
    return drive(
        run_steps(
            resolved,
            callbacks=callbacks,
            say=say,
            arguments=arguments,
            announce=announce,
            evaluators=evaluators,
            policy=policy,
        )
    )


def run_steps(
    resolved: Resolved,
    *,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = print,
    arguments: Sequence[str] | None = None,
    announce: Callable[[Sequence[int]], None] | None = None,
    evaluators: Sequence[Callable[[Prepared], Evaluator]] | None = None,
    policy: PolicyFactory | None = None,
    base: SharedBase | None = None,
    signals: StopSignals | None = None,
) -> Generator[Step, StepOutput, RunResult]:
    """`train` step by step, see `swift.train.loop.Trainer.steps`.

    Args:
        base: the model that this run shares with others; None: one of its own.
        signals: what stops it; None: the signals of this process.
    """
    _refuse_import_by_worker()
    _check_helpers(resolved, evaluators, policy)
    own_callbacks = load_callbacks(resolved.config.report.callbacks)
    world = _meet(resolved)
    restart = world.from_main(restart_folder() if base is None else None)
    prepared = world.main_first(partial(prepare, resolved, world, restart))
    check_place_in_data(prepared)
    if not world.is_main:
        callbacks, own_callbacks, say, announce = (), [], _say_nothing, None
    if announce is not None and prepared.stream is None:
        announce(prepared.sample_lengths())
    resumed_step = read_state(prepared.checkpoint).step if prepared.checkpoint else 0
    folder = _open_folder(resolved, prepared.checkpoint, world, restart)
    status = StatusFile(folder.path, total_steps=prepared.plan.total_steps)
    closing = contextlib.ExitStack()  # closed in reverse: the log and the lock last
    closing.callback(folder.release)
    closing.callback(detach_run_logs)
    closing.callback(gc.unfreeze)
    try:
        attach_run_logs(folder.path if world.is_main else folder.path.parents[1], world.rank)
        status.start_heartbeat()
        if world.is_main and prepared.checkpoint is None:
            _record(folder, prepared, arguments)
        _tell(prepared.data.notes, say)
        status.update(stage="load model")
        trackers = tracker_callbacks(resolved.config.report.report_to) if world.is_main else []
        everyone = [*callbacks, *trackers, *own_callbacks]
        for callback in everyone:
            closing.callback(callback.close)
        trainer = build(prepared, folder, status, everyone, say, closing, evaluators or (), policy, base)
        trainer.signals = signals or trainer.signals
        if world.is_main and prepared.checkpoint is not None:
            # Only now: options that do not fit the checkpoint were refused, and the next resume must not find them.
            _record(folder, prepared, arguments)
        if resumed_step >= prepared.plan.total_steps:
            say(f"nothing is left to do: all {resumed_step} steps are done; a larger --max_steps goes on")
        elif resumed_step:
            say(f"going on from {prepared.checkpoint} (step {resumed_step} of {prepared.plan.total_steps})")
        gc.freeze()  # what is loaded by now stays to the end and need not be searched for garbage
        gc.enable()
        trained = yield from trainer.steps()
        summary = {**_about(resolved, folder), **trained}
        write_summary(folder.path, summary)
        _tell(stream_notes(trainer.state.stream_report, resolved.config.data), say)
        if world.is_main:
            _draw_curves(folder.path)
        for callback in trainer.callbacks:
            callback.on_train_end(trainer, summary)
        status.finish("succeeded")
        return RunResult(folder.path, summary)
    except (Interrupted, KeyboardInterrupt, GeneratorExit) as stop:
        status.finish("stopped", str(stop))
        raise
    except BaseException as error:  # whatever ended the run, its status must say so
        logger.error("the run failed", exc_info=not isinstance(error, SwiftError))
        status.finish("failed", str(error), failure=failure_kind(error))
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


def _check_helpers(
    resolved: Resolved,
    evaluators: Sequence[Callable[[Prepared], Evaluator]] | None,
    policy: PolicyFactory | None,
) -> None:
    """Raise ConfigError for a caller that does not bring what the options need."""
    if resolved.config.evaluation.eval_tasks is not None and evaluators is None:
        raise ConfigError(
            "nobody evaluates the tasks", where="--eval_tasks", fix="evaluators=suite_evaluators(resolved)"
        )
    if resolved.config.rlhf.is_policy and policy is None:
        raise ConfigError(
            "nobody samples the answers", where="--rlhf_type", fix="swift.rl.run.train(resolved)"
        )


def _tell(notes: Iterable[str], say: Callable[[str], None]) -> None:
    for note in notes:
        logger.warning(note)
        say(note)


def _about(resolved: Resolved, folder: RunFolder) -> dict[str, Any]:
    """What a summary begins with."""
    task = resolved.config.task.task_type
    about = {"folder": str(folder.path), "command": resolved.command}
    return about if task == "causal_lm" else {**about, "task_type": task}


def _draw_curves(folder: Path) -> None:
    """A picture that cannot be written must not turn a trained model into a failed run."""
    try:
        draw_curves(folder)
    except OSError as error:
        logger.warning("curves.png could not be written: %s", error)


def _meet(resolved: Resolved) -> World:
    """The processes of the run."""
    layout = Layout.of(resolved.config.parallel)
    kind = pick_device(resolved.config.model.device).type if layout.world_size > 1 else "cpu"
    return join(layout, kind, resolved.config.parallel.ddp_timeout)


def _open_folder(
    resolved: Resolved, checkpoint: Path | None, world: World, restart: Path | None
) -> RunFolder:
    """A resumed run continues its own folder; a new one gets a folder of its own. Other ranks have theirs in it."""
    folder: RunFolder | None = None
    if world.is_main:
        options = resolved.config.checkpoint
        going_on = restart or (checkpoint.parent if checkpoint else None)
        folder = (
            RunFolder.open(going_on, write=True)
            if going_on is not None
            else RunFolder.create(options.output_dir, options.run_name)
        )
    path = world.from_main(folder.path if folder else Path())
    if world.size > 1:
        note_run_folder(path, world.rank)
    return folder or RankFolder(path, world.rank)


def _say_nothing(text: str) -> None:
    """The terminal is rank 0's."""


def _record(folder: RunFolder, prepared: Prepared, arguments: Sequence[str] | None) -> None:
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
        data_files=[file for name in names for file in find_files(parse_dataset_spec(name))],
        model_path=prepared.model_path,
        extra={
            "template": prepared.template.fingerprint,
            "resumed_from": str(prepared.checkpoint) if prepared.checkpoint else None,
            "training_data": asdict(prepared.data.train.report),
        },
    )
