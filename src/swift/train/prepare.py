"""What is known and checked before the model's weights are read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from swift.config.policy_rules import steps_of_prompts
from swift.config.schema import Config, Resolved
from swift.core.devices import pick_device, pick_dtype
from swift.core.errors import ConfigError
from swift.core.heap import keep_freed_memory
from swift.data.batching import BatchSchedule
from swift.data.load import LoadedData, load_data
from swift.data.mode import batch_mode, derive_layout, derive_max_length
from swift.data.stream import Stream, open_stream
from swift.models.facts import ModelFacts
from swift.models.load import isolates_documents, load_template
from swift.models.quantised import check_loadable
from swift.models.template import Template
from swift.parallel.accepted import Decoder, check_dimensions
from swift.parallel.world import World
from swift.runs.folder import RunFolder
from swift.train.callbacks.trackers import check_trackers
from swift.train.checkpoints import read_state
from swift.train.loop import StepPlan
from swift.train.precision import check_precision, export_dtype
from swift.train.preflight import check_goes_on, find_checkpoint, preflight
from swift.train.state import TrainState
from swift.train.tasks import check_negatives

__all__ = ["Prepared", "data_order", "pieces_asked", "prepare"]


@dataclass
class Prepared:
    """Everything that is known before the model's weights are read."""

    resolved: Resolved
    model_path: Path
    checkpoint: Path | None
    device: torch.device
    dtype: torch.dtype
    export_dtype: torch.dtype
    template: Template
    data: LoadedData
    schedule: BatchSchedule
    plan: StepPlan
    world: World
    stream: Stream | None = None

    def sample_lengths(self) -> list[int]:
        """Tokens of each training sample, then of those that split_dataset_ratio set aside."""
        lengths: list[int] = self.data.train.lengths.tolist()
        if self.data.validation is not None and not self.resolved.config.data.val_dataset:
            lengths += self.data.validation.lengths.tolist()
        return lengths


def prepare(resolved: Resolved, world: World | None = None, restart: Path | None = None) -> Prepared:
    """Check and resolve everything that needs no weights; the cheapest checks come first.

    ``restart``: the run that goes on because a process died; from its last checkpoint, if it has one.
    """
    config = resolved.config
    world = world or World()
    model_path = preflight(resolved, begins=world.is_main and restart is None)
    check_trackers(config.report.report_to)
    checkpoint = RunFolder(restart).latest_checkpoint() if restart else None
    checkpoint = checkpoint or find_checkpoint(resolved)
    if checkpoint is not None:
        check_goes_on(resolved, checkpoint)
    facts = ModelFacts.read(model_path)
    derive_max_length(resolved, facts)
    check_dimensions(config.parallel, Decoder.of(facts.config), config.data.max_length)
    device, dtype = _device(resolved, facts, model_path, world)
    resolved.derive("gradient_checkpointing", device.type != "cpu", "device")
    _settle_cpu(resolved, device)
    template = _template(resolved, model_path)
    assert config.data.max_length is not None
    loaded = None if config.data.streaming else load_data(resolved, template, config.data.max_length)
    remote = config.model.trust_remote_code
    derive_layout(resolved, isolates_documents(model_path, config.model.attn_impl, trust_remote_code=remote))
    order_batch_size, split, in_step = data_order(resolved, checkpoint)
    _check_in_batch(config, order_batch_size, split)
    stream = None
    if loaded is None:
        stream, data, schedule = open_stream(resolved, template, order_batch_size, split)
        plan = StepPlan(config.training.max_steps, None, in_step)
    else:
        data, schedule = loaded, _schedule(config, loaded, order_batch_size, split)
        plan = (
            _policy_plan(config, len(data.train), in_step)
            if config.rlhf.is_policy
            else _step_plan(resolved, schedule, in_step)
        )
    check_negatives(resolved, data.train)
    return Prepared(
        resolved,
        model_path,
        checkpoint,
        device,
        dtype,
        export_dtype(facts, dtype),
        template,
        data,
        schedule,
        plan,
        world,
        stream,
    )


def _device(
    resolved: Resolved, facts: ModelFacts, model_path: Path, world: World
) -> tuple[torch.device, torch.dtype]:
    """Where the run computes and how. Raises ConfigError for options that this device or precision cannot do."""
    config = resolved.config
    device = pick_device(config.model.device, world.local_rank)
    check_loadable(facts.config, device.type, config.quantization, str(model_path))
    _limit_device_memory(device)
    if config.training.use_liger_kernel and device.type != "cuda":
        raise ConfigError(
            "liger kernels need a CUDA device", where="--use_liger_kernel", fix="leave the option out"
        )
    if config.training.activation_cpu_offload and device.type == "cpu":
        why = "they are in host memory already"
        raise ConfigError("needs an accelerator", where="--activation_cpu_offload", why=why)
    dtype = pick_dtype(config.model.torch_dtype, device)
    check_precision(resolved, dtype)
    return device, dtype


def _check_in_batch(config: Config, order_batch_size: int, split: int) -> None:
    """Raise ConfigError for a run that goes on with smaller micro-batches and whose loss would be another one then."""
    if split > 1 and (config.task.is_in_batch or config.rlhf.is_in_batch):
        loss = config.task.loss_type or " and ".join(config.rlhf.rlhf_loss_type)
        raise ConfigError(
            f"{loss} compares the rows of a micro-batch: smaller ones make another loss",
            where="--per_device_train_batch_size",
            fix=f"--per_device_train_batch_size {order_batch_size}, with a smaller --max_length if memory runs out",
        )


def _schedule(config: Config, data: LoadedData, batch_size: int, split: int) -> BatchSchedule:
    assert config.data.max_length is not None
    return BatchSchedule(
        data.train.lengths,
        batch_size=batch_size,
        split=split,
        mode=batch_mode(config.data),
        # A pair of answers is two sequences, each of which may be that long.
        max_length=config.data.max_length * (2 if config.rlhf.is_paired else 1),
        group_by_length=config.data.group_by_length,
        shuffle=config.data.dataset_shuffle,
        seed=config.data.data_seed or 0,
    )


def _settle_cpu(resolved: Resolved, device: torch.device) -> None:
    """Threads, and how memory is kept."""
    # oneDNN keeps a compiled kernel for each of the last 1,024 shapes; rows of every length would make that 0.4 GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
    resolved.derive("num_threads", threads, "OMP_NUM_THREADS or the cores")
    torch.set_num_threads(resolved.config.training.num_threads or threads)
    if device.type == "cpu":
        keep_freed_memory()


def _template(resolved: Resolved, model_path: Path) -> Template:
    config = resolved.config
    template = load_template(
        model_path,
        config.template,
        pretraining=resolved.command == "pt",
        trust_remote_code=config.model.trust_remote_code,
    )
    if template.chat is not None and config.template.chat_template:
        # Checkpoints carry the template they were trained with, so that other programs use it as well.
        template.tokenizer.chat_template = template.chat.source
    return template


def _limit_device_memory(device: torch.device) -> None:
    """Keep to the share of a CUDA device that the experiment service gave this job."""
    share = os.environ.get("SWIFT_DEVICE_MEMORY_BYTES")
    if share and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, int(share) / total), device)


def pieces_asked(config: Config) -> int:
    """Micro-batches of an optimizer step over all processes, as the options have it."""
    training = config.training
    if training.global_batch_size is not None:
        return training.global_batch_size // training.per_device_train_batch_size
    return (training.gradient_accumulation_steps or 1) * config.parallel.data_parallel_size


def data_order(resolved: Resolved, checkpoint: Path | None) -> tuple[int, int, int]:
    """(micro-batch by which the order of the data is made, pieces that each is cut into, pieces of a step in all).

    A run that goes on with a smaller micro-batch and as much more accumulation, because memory ran out, sees the same
    samples in the same steps: the order stays that of the micro-batch it began with. So does the size of its steps when
    it goes on with another number of processes, unless the options of a step were changed too. Prompts of policy
    optimisation follow one another, whatever the micro-batches of their answers are.
    """
    batch = resolved.config.training.per_device_train_batch_size
    ranks, in_step = resolved.config.parallel.data_parallel_size, pieces_asked(resolved.config)
    state = read_state(checkpoint) if checkpoint else TrainState()
    began, split = state.order_batch_size, 1
    if began > batch and began % batch == 0 and in_step % (began // batch) == 0:
        split = began // batch
    typed = resolved.sources["gradient_accumulation_steps"].kind == "flag"
    if resolved.config.rlhf.is_policy:
        answers = began * state.step_size
        same = state.data_ranks != 0 and not typed and answers % batch == 0
        return batch, 1, answers // batch if same else in_step
    if state.data_ranks not in (0, ranks) and (split > 1 or began == batch) and not typed:
        in_step = state.step_size * split
    return batch * split, split, in_step


def _policy_plan(config: Config, num_prompts: int, in_step: int) -> StepPlan:
    """Of policy optimisation: every batch of prompts gives a few steps; passes over the prompts join without a gap."""
    training = config.training
    per_epoch = steps_of_prompts(config.policy, num_prompts, training.per_device_train_batch_size * in_step)
    wanted = math.ceil(training.num_train_epochs * per_epoch)
    return StepPlan(training.max_steps if training.max_steps > 0 else wanted, per_epoch, in_step)


def _step_plan(resolved: Resolved, schedule: BatchSchedule, in_step: int) -> StepPlan:
    training = resolved.config.training
    steps_per_epoch = schedule.num_steps(in_step)
    total = (
        training.max_steps
        if training.max_steps > 0
        else math.ceil(training.num_train_epochs * steps_per_epoch)
    )
    return StepPlan(total, steps_per_epoch, in_step)
