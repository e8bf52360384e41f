"""Pipeline parallelism: every rank keeps consecutive layers, and micro-batches pass through the ranks.

A stage runs the model's own backbone with other layers put in place of those it does not have: one that hands the
received hidden states on, and some that do nothing. So everything a model does beside its layers (masks, rotary
embeddings) is done by its own code, for every decoder whose layers need hidden states and what is computed from
positions, and nothing else of one another. The last stage computes the loss; the order of work is torch's schedules'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from swift.models.sharded import local
from swift.parallel.accepted import STAGES_OF_A_RANK
from swift.parallel.tensor import final_norms
from swift.tuners.targets import decoder_layers

__all__ = ["SCHEDULES", "MicroBatch", "Pipeline", "split_layers"]

SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zb": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
"""Name -> class in torch.distributed.pipelining."""


def split_layers(count: int, stages: int) -> list[range]:
    """The layers of each stage. What is left over goes to stages in the middle: the ends have embedding and head."""
    size, left = divmod(count, stages)
    sizes = [size] * stages
    middle = sorted(range(stages), key=lambda stage: abs(2 * stage + 1 - stages))
    for stage in middle[:left]:
        sizes[stage] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _holders(size: int, schedule: str) -> list[int]:
    """Which rank has each stage."""
    if STAGES_OF_A_RANK[schedule] == 1:
        return list(range(size))
    back = range(size) if schedule != "zbv" else reversed(range(size))
    return [*range(size), *back]


@dataclass(frozen=True)
class MicroBatch:
    """What the stages need of a micro-batch: tokens, and other arguments of the backbone."""

    input_ids: Tensor
    inputs: Mapping[str, Any]


class _Nothing(nn.Module):
    """In the place of a part that another stage has."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Received(nn.Module):
    """In the place of the layer before the stage's first: what came from the stage before."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.states is not None
        return self.states


class Stage(nn.Module):
    """Some layers of a model, as a function from hidden states to hidden states.

    Args:
        model: the whole model; its modules are shared, not copied.
        layers: which of its layers the stage has.
        pipeline: has the micro-batches that the schedule calls by number.
    """

    def __init__(self, model: Any, layers: range, is_first: bool, is_last: bool, pipeline: Pipeline) -> None:
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        self._pipeline = [pipeline]  # in a list: no module, and no cycle of copies
        name, everything = decoder_layers(model)
        base = copy.copy(getattr(model, model.base_model_prefix))
        base._modules = dict(base._modules)
        present: list[nn.Module] = [_Nothing() for _ in everything]
        self.received = _Received()
        for number in layers:
            present[number] = everything[number]
        if not is_first:
            present[layers.start - 1] = self.received
        setattr(base, name.rpartition(".")[2], nn.ModuleList(present))
        if not is_last:
            for norm in final_norms(model):
                setattr(base, norm, _Nothing())
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        shared = (
            is_last and getattr(head, "weight", None) is embedding.weight
        )  # keeps its name by the embedding
        if not is_first and not shared:
            for key, module in list(base.named_children()):
                if module is embedding:
                    setattr(base, key, _Nothing())
        self.base = base
        if is_last:  # so that it is among the stage's parameters
            self.head = head

    def forward(self, states: Tensor, number: Tensor) -> Tensor:
        """Hidden states to hidden states; of the first stage from anything, of the last one to the loss ``[1]``."""
        pipeline = self._pipeline[0]
        place = int(number.item())
        batch = pipeline.batches[place]
        inputs = {**batch.inputs, "use_cache": False}
        with pipeline.around(place):
            if self.is_first:
                found = self.base(input_ids=batch.input_ids, **inputs).last_hidden_state
            else:
                self.received.states = states
                found = self.base(inputs_embeds=states.detach(), **inputs).last_hidden_state
                self.received.states = None
            if self.is_last:
                return pipeline.finish(place, found).reshape(1)
        found = found.to(pipeline.dtype)
        # Without anything to train in the first stage torch's schedules would find no graph.
        return found.requires_grad_() if torch.is_grad_enabled() and not found.requires_grad else found


class Pipeline:
    """The stages of one rank of a group, and how micro-batches pass through all of them.

    The model loses (in place) the layers that this rank does not have; its parameters keep their names.

    Args:
        model: with adapters, after `apply_tensor_parallel` and before `fully_shard`.
        group: the ranks that have the model's stages.
        width_share: by what the width of hidden states is smaller than that of a rank's tokens (`TensorParallel` with
            ``sequence``).
    """

    def __init__(
        self, model: Any, group: dist.ProcessGroup, schedule: str = "1f1b", *, width_share: int = 1
    ) -> None:
        self.group, self.schedule, self.width_share = group, schedule, width_share
        self.holders = _holders(group.size(), schedule)
        parts = split_layers(len(decoder_layers(model)[1]), len(self.holders))
        mine = [stage for stage, rank in enumerate(self.holders) if rank == group.rank()]
        last = len(parts) - 1
        self.stages = {stage: Stage(model, parts[stage], stage == 0, stage == last, self) for stage in mine}
        self.dtype = model.get_input_embeddings().weight.dtype
        self.size = model.config.get_text_config().hidden_size
        self.batches: Sequence[MicroBatch] = ()
        self.around: Callable[[int], Any] = lambda number: torch.enable_grad()
        self.finish: Callable[[int, Tensor], Tensor] = lambda number, states: states.sum()
        self.tied = self._tied_group(model)
        self._prune(model, {number for stage in mine for number in parts[stage]})
        self._schedules: dict[tuple[int, ...], Any] = {}

    @property
    def device(self) -> torch.device:
        """Where this rank's layers are."""
        return next(parameter.device for stage in self.stages.values() for parameter in stage.parameters())

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage, which knows the loss."""
        return self.holders[-1] == self.group.rank()

    @property
    def tied_copy(self) -> str | None:
        """Name of a weight that this rank has only because its head shares it with another rank's embedding."""
        return self.tied if self.has_last and self.holders[0] != self.holders[-1] else None

    def _tied_group(self, model: Any) -> str | None:
        """Name of the weight that embedding and head share, where two ranks have them."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.ends: dist.ProcessGroup | None = None
        if getattr(head, "weight", None) is not embedding.weight or self.holders[0] == self.holders[-1]:
            return None
        ranks = dist.get_process_group_ranks(self.group)
        if self.group.rank() in (self.holders[0], self.holders[-1]):
            members = [ranks[self.holders[0]], ranks[self.holders[-1]]]
            self.ends = dist.new_group(members, use_local_synchronization=True)
        return next(name for name, parameter in model.named_parameters() if parameter is embedding.weight)

    def _prune(self, model: Any, kept: set[int]) -> None:
        _, layers = decoder_layers(model)
        for number in range(len(layers)):
            if number not in kept:
                layers[number] = _Nothing()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        gone = [] if 0 in self.stages or (self.tied and self.has_last) else [embedding]
        if not self.has_last:
            base = getattr(model, model.base_model_prefix)
            gone += [head, *(getattr(base, norm) for norm in final_norms(model))]
        for key, module in list(model.named_modules()):
            if any(module is one for one in gone):
                model.set_submodule(key, _Nothing())

    def multiple(self, number: int) -> int:
        """To how many micro-batches a step of ``number`` has to be filled up."""
        size = self.group.size()
        return number if self.schedule == "gpipe" else -(-number // size) * size

    def sum_tied(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the gradient of a weight that embedding and head share whole, on both ranks that have it."""
        parameter = parameters.get(self.tied or "")
        if self.ends is not None and parameter is not None:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(local(gradient), group=self.ends)
            parameter.grad = gradient

    def run(
        self,
        batches: Sequence[MicroBatch],
        finish: Callable[[int, Tensor], Tensor],
        around: Callable[[int], Any],
    ) -> None:
        """Forward and backward passes of all micro-batches, which have the same shape.

        Args:
            finish: on the last stage, from number and hidden states to the micro-batch's share of the loss.
            around: a context for a micro-batch's forward passes.
        """
        self.batches, self.finish, self.around = batches, finish, around
        schedule = self._schedule_of(batches)
        numbers = torch.arange(len(batches))
        first = (numbers,) if 0 in self.stages else ()
        target = {"target": numbers} if self.has_last else {}
        schedule.step(*first, number=numbers, **target)
        self.batches = ()

    @torch.no_grad()
    def run_forward(self, batches: Sequence[MicroBatch], finish: Callable[[int, Tensor], Tensor]) -> None:
        """Forward passes alone; micro-batches may have any shapes."""
        self.batches, self.finish, self.around = batches, finish, lambda number: torch.no_grad()
        ranks, rank = dist.get_process_group_ranks(self.group), self.group.rank()
        for number, batch in enumerate(batches):
            states = torch.empty(self._shape(batch), dtype=self.dtype, device=batch.input_ids.device)
            for stage, module in self.stages.items():
                if stage > 0 and self.holders[stage - 1] != rank:
                    dist.recv(states, ranks[self.holders[stage - 1]], group=self.group)
                states = module(states, torch.tensor([number])).contiguous()
                if stage + 1 < len(self.holders) and self.holders[stage + 1] != rank:
                    dist.send(states, ranks[self.holders[stage + 1]], group=self.group)
        self.free()  # no backward pass will do so
        self.batches = ()

    def free(self) -> None:
        """Let go of all weights of stages in shards that have been gathered."""
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def collect(
        self, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all stages, whole, on the group's first rank if that is the run's first; else nothing."""
        ranks, rank = dist.get_process_group_ranks(self.group), self.group.rank()
        held: list[Any] = [None] * len(ranks)
        own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        dist.all_gather_object(held, own, group=self.group)
        seen: set[str] = set()
        for holder, entries in enumerate(held):
            for name, shape, dtype in entries:
                if name in seen:  # shared by embedding and head
                    continue
                seen.add(name)
                if holder == rank:
                    value = whole(tensors[name])
                    if rank > 0 and ranks[0] == 0:
                        dist.send(value.contiguous(), 0, group=self.group)
                    elif rank == 0:
                        yield name, value
                elif rank == 0 and ranks[0] == 0:
                    value = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(value, ranks[holder], group=self.group)
                    yield name, value

    def from_last(self, value: Any) -> Any:
        """What the rank with the last stage says."""
        box = [value]
        source = dist.get_process_group_ranks(self.group)[self.holders[-1]]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def _shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        rows, width = batch.input_ids.shape
        return rows, width // self.width_share, self.size

    def _schedule_of(self, batches: Sequence[MicroBatch]) -> Any:
        """Torch's schedule for this many micro-batches of this shape."""
        from torch.distributed import pipelining

        shape = self._shape(batches[0])
        key = (len(batches), *shape)
        if key not in self._schedules:
            while len(self._schedules) >= 4:
                self._schedules.pop(next(iter(self._schedules)))
            device = batches[0].input_ids.device
            between = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
            number = torch.empty(1, dtype=torch.int64, device="meta")
            loss = torch.empty(1, dtype=torch.promote_types(self.dtype, torch.float32), device="meta")
            last = len(self.holders) - 1
            stages = [
                pipelining.PipelineStage(
                    module,
                    stage,
                    len(self.holders),
                    device,
                    input_args=number if stage == 0 else between,
                    output_args=loss if stage == last else between,
                    group=self.group,
                )
                for stage, module in self.stages.items()
            ]
            self._schedules[key] = getattr(pipelining, SCHEDULES[self.schedule])(
                stages[0] if STAGES_OF_A_RANK[self.schedule] == 1 else stages,
                n_microbatches=len(batches),
                loss_fn=lambda output, target: output.sum(),
                scale_grads=False,
            )
        return self._schedules[key]
