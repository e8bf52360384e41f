"""One DeviceMesh for every dimension.

``build_mesh`` has the axes of `Layout` (``pp, dp_replicate, dp_shard, cp, tp``) and flattened ones over them:

- ``dp``: ranks with different data (replicas x shards), over which losses and counts are added up;
- ``dp_shard_cp``: over which FSDP shards weights (a rank with another part of the sequence has another gradient);
- ``dp_cp``: over which gradients are added up.

``build_expert_mesh`` cuts the same ranks the other way: ``pp, dp_replicate, ep_shard, ep``; experts are split over
``ep`` and sharded by FSDP over ``ep_shard``.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swift.parallel.layout import AXES, Layout

__all__ = ["build_expert_mesh", "build_mesh"]

_FLATTENED = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh of all processes, whose default group must exist: every one of them has to call this.

    ``mesh["tp"]``, ``mesh["dp_shard_cp"]``... are the meshes of one axis.
    """
    mesh = init_device_mesh(device_type, tuple(getattr(layout, axis) for axis in AXES), mesh_dim_names=AXES)
    for name, axes in _FLATTENED.items():
        mesh[axes]._flatten(name)
    return mesh


def build_expert_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The same ranks, cut for experts. Every process has to call this."""
    shape = (layout.pp, layout.dp_replicate, layout.ranks_of_a_copy // layout.ep, layout.ep)
    return init_device_mesh(device_type, shape, mesh_dim_names=("pp", "dp_replicate", "ep_shard", "ep"))
