"""Ranks with data of their own: gradients are added up over them, and with shards nobody holds the whole model.

Losses are divided by denominators of all ranks, so gradients are *added*, never averaged: the step is that of one
process with the same micro-batches.

Copies (DDP) add up their gradients in buckets while the last micro-batch's backward pass is still going on. Shards
(FSDP2, with copies of them HSDP) are `fully_shard`'s: it gathers a layer's weights before they are used and scatters
the sums of its gradients. What of the model lies outside the decoder layers is the root's group; the root is a module
around the model, because an engine computes less than the model's own ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from swift.core.errors import SwiftError
from swift.data.collate import Batch
from swift.models.sharded import local
from swift.parallel.experts import ExpertParallel
from swift.parallel.pipeline import Pipeline
from swift.parallel.sequence.context import ContextParallel, pad_batch
from swift.parallel.sequence.context import Shard as Cut
from swift.parallel.tensor import TensorParallel
from swift.parallel.world import World

__all__ = ["GradientSum", "ShardedRoot", "check_reduced", "global_norm", "shard_model", "whole"]

BUCKET_BYTES = 25 << 20


class ShardedRoot(nn.Module):
    """A sharded model, and whatever is computed with it between gathering and freeing its outer weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        return compute(*args)

    def free(self) -> None:
        """Let go of all gathered weights."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True)
class ShardOptions:
    """How weights are sharded.

    Attributes:
        param_dtype: weights are gathered in this precision; None: as they are stored.
        reshard_after_forward: free a layer's weights between its passes.
        offload: keep shards, gradients and optimizer in host memory.
        whole: parameters that stay whole on every rank.
    """

    param_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    offload: bool = False
    whole: frozenset[nn.Parameter] = frozenset()


def shard_model(
    model: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    options: ShardOptions,
    stages: Sequence[nn.Module] = (),
    experts: ExpertParallel | None = None,
) -> ShardedRoot:
    """Shard each layer, and what is left, over ``dp_shard`` x ``cp``. Parameters become DTensors.

    Adapters must be attached before. Every rank calls this with the same weights, or with meta tensors.
    ``stages``: of a pipeline; then each of these is a root, and what is returned is none. ``experts``: what lies on
    several ranks already is sharded over those that have the same experts.
    """
    assert world.mesh is not None
    mesh, copies = world.mesh["dp_shard_cp"], world.layout.dp_replicate > 1
    if copies:
        mesh = world.mesh["dp_replicate", "dp_shard_cp"]
    pin = options.offload and mesh.device_type != "cpu"
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=options.param_dtype,
            reduce_dtype=torch.float32 if options.param_dtype else None,
            cast_forward_inputs=False,  # autocast does what is left to do
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if options.offload else OffloadPolicy(),
        "ignored_params": set(options.whole),
    }
    for parameter in options.whole:
        parameter.data = parameter.data.to(mesh.device_type)
    for module in experts.modules if experts else ():
        assert experts is not None
        fully_shard(
            module,
            **{
                **settings,
                "mesh": experts.mesh["dp_replicate", "ep_shard"] if copies else experts.mesh["ep_shard"],
            },
            reshard_after_forward=options.reshard_after_forward,
            # There may be fewer experts than ranks, and LoRA's rank is small.
            shard_placement_fn=lambda parameter: Shard(1 if parameter.shape[1] >= parameter.shape[2] else 2),
        )
    for layer in (layer for layer in layers if any(True for _ in layer.parameters())):
        fully_shard(layer, reshard_after_forward=options.reshard_after_forward, **settings)
    root = ShardedRoot(model)
    for outer in stages or (root,):
        fully_shard(outer, reshard_after_forward=False, **settings)
    for module in {module for outer in stages or (root,) for module in outer.modules()}:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


class GradientSum:
    """Adds up the gradients of copies over ``group``.

    Args:
        parameters: in the same order on all ranks.
        group: the ranks that add up.

    Parameters are put into fixed buckets, last ones first, as their gradients come about. A bucket is sent as soon as
    it is complete, in the order of the buckets, so that all ranks send the same. A parameter that this rank did not
    use counts as zero; one that nobody used keeps no gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: distributed.ProcessGroup) -> None:
        self.group = group
        self.parameters = list(parameters)
        self.buckets: list[list[nn.Parameter]] = []
        size = BUCKET_BYTES
        for parameter in reversed(self.parameters):
            number = parameter.numel() * parameter.element_size()
            if size + number > BUCKET_BYTES or parameter.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += number
        self._bucket_of = {
            parameter: number for number, bucket in enumerate(self.buckets) for parameter in bucket
        }
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._missing: list[int] = []
        self._sent: list[tuple[list[Tensor], Tensor, Any]] = []

    def arm(self) -> None:
        """The next backward pass is the last one of the step: send what it completes."""
        self._missing = [sum(parameter.requires_grad for parameter in bucket) for bucket in self.buckets]
        self._sent = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] <= 0:
            self._send(self.buckets[len(self._sent)])

    def _send(self, bucket: list[nn.Parameter]) -> None:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in bucket
            if parameter.requires_grad
        ]
        if not gradients:
            self._sent.append(([], torch.empty(0), None))
            return
        flat = torch.cat([local(gradient).reshape(-1) for gradient in gradients])
        work = distributed.all_reduce(flat, group=self.group, async_op=True)
        self._sent.append((gradients, flat, work))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, wait, and put the sums into ``grad``."""
        used = torch.tensor([float(parameter.grad is not None) for parameter in self.parameters])
        distributed.all_reduce(used, group=self.group)
        while len(self._sent) < len(self.buckets):
            self._send(self.buckets[len(self._sent)])
        anywhere = dict(zip(self.parameters, used.tolist(), strict=True))
        for bucket, (gradients, flat, work) in zip(self.buckets, self._sent, strict=True):
            if work is not None:
                work.wait()
            trained = [parameter for parameter in bucket if parameter.requires_grad]
            parts = flat.split([local(gradient).numel() for gradient in gradients]) if gradients else ()
            for parameter, gradient, part in zip(trained, gradients, parts, strict=True):
                if anywhere[parameter]:
                    local(gradient).copy_(part.view_as(local(gradient)))
                    parameter.grad = gradient
        self._missing, self._sent = [], []


def check_reduced(parameters: Mapping[str, nn.Parameter], summed: Iterable[nn.Parameter]) -> None:
    """Raise SwiftError when a trained parameter is neither sharded nor among those whose gradients are added up."""
    known = set(summed)
    lost = [
        name
        for name, parameter in parameters.items()
        if parameter.requires_grad and not isinstance(parameter, DTensor) and parameter not in known
    ]
    if lost:
        raise SwiftError(
            f"the gradients of {len(lost)} parameters would stay those of one rank",
            where=", ".join(lost[:3]),
            why="they were added after the model was sharded",
        )


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, shards of all ranks included; the same number everywhere."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(
            gradient
        )
    norms = []
    for group in by_mesh.values():
        norm = nn.utils.get_total_norm(group, foreach=group[0].device.type != "cpu")
        norms.append(whole(norm))
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks; every rank that has a part must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Ranks:
    """What an engine's step does together with other ranks.

    Args:
        world: the processes.
        parameters: all that are trained, by name.
        root: of a sharded model; None: every rank has a copy.
        context: ranks that share every row of a batch.
        tensor: ranks that share every layer.
        pipeline: ranks that have the model's stages.
        experts: ranks that have the model's experts.
        keeps_whole: what is trained of a sharded model is not sharded (adapters of runs that share it).
    """

    def __init__(
        self,
        world: World,
        parameters: Mapping[str, nn.Parameter],
        root: ShardedRoot | None = None,
        context: ContextParallel | None = None,
        tensor: TensorParallel | None = None,
        pipeline: Pipeline | None = None,
        experts: ExpertParallel | None = None,
        keeps_whole: bool = False,
    ) -> None:
        assert world.mesh is not None
        self.world, self.parameters = world, parameters
        self.context, self.tensor, self.pipeline = context, tensor, pipeline
        self.root = root if pipeline is None else None  # stages are roots of their own
        # With a root all must be its shards; without one, parameters that ranks of tp share have copies as well.
        copies = {} if root is not None and not keeps_whole else dict(parameters)
        other = [copies.pop(name) for name in sorted(experts.names & copies.keys())] if experts else []
        self._sums = [
            GradientSum(list(same), group)
            for same, group in (
                (copies.values(), world.mesh["dp_cp"].get_group()),
                (other, experts.copies if experts else None),
            )
            if same and group is not None
        ]
        check_reduced(parameters, [*copies.values(), *other])

    @property
    def multiple(self) -> int:
        """What the width of a rank's part of a batch has to be a multiple of."""
        return self.tensor.multiple if self.tensor else 1

    @property
    def cuts_rows(self) -> bool:
        """Whether rows are filled up or cut for the ranks that share them."""
        return self.context is not None or self.multiple > 1

    def compute(self, work: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        """``work(*args)`` while the weights it needs are there."""
        if self.root is None:
            return work(*args)
        result: tuple[Tensor, ...] = self.root(work, *args)
        if not torch.is_grad_enabled():
            self.root.free()  # no backward pass will do so
        return result

    def free(self) -> None:
        """Let go of all weights that have been gathered."""
        if self.root is not None:
            self.root.free()
        elif self.pipeline is not None:
            self.pipeline.free()

    def number(self, place: int) -> int:
        """The number among all micro-batches of the step of the one that is our number ``place``: of its dropout.

        Ranks that have parts of one sequence drop on their own.
        """
        number = place * self.world.layout.dp + self.world.data_rank
        return (
            number if self.context is None else number * self.context.group.size() + self.context.group.rank()
        )

    def before_last(self) -> None:
        """The next backward pass is the last of the step, and nothing is added to its gradients afterwards."""
        for one in self._sums:
            one.arm()

    def finish(self) -> None:
        """All gradients are sums over all ranks now."""
        for one in self._sums:
            one.finish()
        if self.tensor is not None:
            self.tensor.sum_gradients(self.parameters)
        if self.pipeline is not None:
            self.pipeline.sum_tied(self.parameters)

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The norm of all gradients, those of other ranks included."""
        twice = self.pipeline.tied_copy if self.pipeline else None
        norm = global_norm([p.grad for name, p in parameters.items() if p.grad is not None and name != twice])
        if self.pipeline is not None:
            square = norm.square()
            distributed.all_reduce(square, group=self.pipeline.group)
            norm = square.sqrt()
        return norm

    def cut(self, batch: Batch) -> Cut:
        """What this rank computes of a batch, with the width that it needs."""
        if self.context is not None:
            return self.context.shard(batch, self.multiple)
        return Cut(pad_batch(batch, self.multiple))

    def alike(self, batches: Sequence[Batch]) -> list[Cut]:
        """`cut` of several batches, which get the same shape."""
        rows = max(batch.input_ids.shape[0] for batch in batches)
        width = max(batch.input_ids.shape[1] for batch in batches)
        multiple = self.multiple * (self.context.multiple() if self.context else 1)
        return [self.cut(pad_batch(batch, multiple, rows=rows, width=width)) for batch in batches]

    def load_whole(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """The optimizer state that one process has saved."""
        from swift.parallel.states import load_whole

        load_whole(optimizer, state)

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter with the shards of all ranks."""
        return whole(tensor)

    def collect(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, one after another, on rank 0 those of all pipeline stages; all ranks call this."""
        if self.pipeline is None:
            yield from ((name, whole(tensor)) for name, tensor in tensors.items())
        else:
            yield from self.pipeline.collect(tensors, whole)
