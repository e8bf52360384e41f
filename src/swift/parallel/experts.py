"""Expert parallelism: every rank has some of the experts of each layer, and tokens travel to theirs and back.

The ranks that share experts hold different tokens (of other data, other parts of a sequence, or split among the ranks
of tp). A token is sent once for each expert that its router chose; the experts run on whatever came, and what they
give goes home, where the router's weights are applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from swift.core.errors import ConfigError
from swift.models.sharded import local
from swift.parallel.layout import Layout
from swift.parallel.mesh import build_expert_mesh
from swift.tuners.lora_parameters import LoraParameters

__all__ = ["ExpertParallel", "apply_expert_parallel"]


@dataclass
class ExpertParallel:
    """A model whose experts lie on several ranks.

    Attributes:
        mesh: ``pp, dp_replicate, ep_shard, ep``; experts are split over ``ep``.
        copies: the ranks that have the same experts as this one, over which their gradients are added up.
        modules: the experts of each layer.
        names: full names of their parameters.
    """

    mesh: DeviceMesh
    copies: dist.ProcessGroup
    modules: list[nn.Module] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


@lru_cache(maxsize=4)
def _mesh(layout: Layout, device_type: str) -> tuple[DeviceMesh, dist.ProcessGroup]:
    mesh = build_expert_mesh(layout, device_type)
    mesh["ep_shard", "ep"]._flatten("ranks_of_a_copy")  # norms are added up over both at once
    return mesh, mesh["dp_replicate", "ep_shard"]._flatten("expert_copies").get_group()


def apply_expert_parallel(model: Any, layout: Layout, device_type: str) -> ExpertParallel:
    """Split the experts of a model (in place) over ``layout.ep`` ranks; every process calls this.

    Before `apply_tensor_parallel`. Parameters keep their names and become DTensors.

    Raises:
        ConfigError: there are no experts in fused weights, or their number does not divide.
    """
    mesh, copies = _mesh(layout, device_type)
    state = ExpertParallel(mesh, copies)
    for name, outer in list(model.named_modules()):
        module = outer.base if isinstance(outer, LoraParameters) else outer
        if name.endswith(".experts") and hasattr(module, "num_experts") and module._parameters:
            _split(name, outer, module, mesh["ep"], state)
    if not state.modules:
        raise ConfigError(
            f"{type(model).__name__} has no experts in fused weights",
            where="--expert_parallel_size",
            fix="leave it out; --data_parallel_shard_size shards the weights of every model",
        )
    return state


def _split(name: str, outer: nn.Module, module: Any, mesh: DeviceMesh, state: ExpertParallel) -> None:
    """``outer``: the module itself, or with its adapters."""
    if module.num_experts % mesh.size():
        raise ConfigError(
            f"{module.num_experts} experts cannot be shared by {mesh.size()} devices",
            where="--expert_parallel_size",
        )
    for path, owner in list(outer.named_modules()):
        for key, whole in list(owner.named_parameters(recurse=False)):
            part = distribute_tensor(whole.data, mesh, [Shard(0)], src_data_rank=None)
            owner.register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))
            state.names.add(".".join(filter(None, (name, path, key))))
    module.num_experts //= mesh.size()
    journey = _Journey(module.num_experts, mesh.get_group())
    module.register_forward_pre_hook(journey.leave)
    module.register_forward_hook(journey.arrive)
    state.modules.append(outer)


class _Trip(NamedTuple):
    """What is needed to bring results home."""

    weights: Tensor
    order: Tensor
    sent: list[int]
    received: list[int]
    parameters: dict[str, Any]
    is_empty: bool


class _Journey:
    """Around the forward of one layer's experts, which get ``(tokens [n, size], indices [n, k], weights [n, k])``."""

    def __init__(self, num_local: int, group: dist.ProcessGroup) -> None:
        self.num_local, self.group = num_local, group
        self.trips: list[_Trip] = []

    def leave(self, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Send every token to its experts; these run on what came, each row for one expert with weight 1."""
        tokens, indices, weights = args
        chosen, size = indices.reshape(-1), self.group.size()
        order = chosen.argsort(stable=True)  # experts of a rank follow one another
        counts = chosen.bincount(minlength=self.num_local * size).view(size, self.num_local)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.group)
        sent, received = torch.stack([counts.sum(1), coming.sum(1)]).tolist()
        rows = _exchange(tokens[order // indices.shape[1]], sent, received, self.group)
        experts = torch.arange(self.num_local, device=rows.device).repeat(size)
        experts = experts.repeat_interleave(coming.reshape(-1), output_size=sum(received))[:, None]
        is_empty = not sum(received)
        if is_empty:  # so that the backward pass comes by here, where the other ranks wait
            rows, experts = rows.sum(0, keepdim=True), experts.new_zeros(1, 1)
        parameters = dict(module._parameters)
        module._parameters.update({key: local(value) for key, value in parameters.items()})  # type: ignore[misc, arg-type]
        self.trips.append(_Trip(weights, order, sent, received, parameters, is_empty))
        return rows, experts, torch.ones_like(experts, dtype=rows.dtype)

    def arrive(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Bring the results home and add up those of a token by the router's weights."""
        trip = self.trips.pop()
        module._parameters.update(trip.parameters)
        home = _exchange(output[:0] if trip.is_empty else output, trip.received, trip.sent, self.group)
        places = torch.empty_like(trip.order)
        places[trip.order] = torch.arange(len(trip.order), device=trip.order.device)
        results = home[places].view(*trip.weights.shape, -1)
        return (results * trip.weights[..., None].to(results.dtype)).sum(1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (received, sent), group
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradients[0], *ctx.sizes, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``sent[i]`` consecutive rows to rank i, and get ``received[i]`` from it."""
    result: Tensor = _Exchange.apply(rows, sent, received, group)
    return result
