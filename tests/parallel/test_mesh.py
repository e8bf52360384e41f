"""Layouts count ranks as the mesh does; the pool of ranks tells what went wrong."""

import itertools
import os
import time

import pytest
import torch
from torch import distributed
from worker_pool import RanksFailed, layout_id, mesh_of, pool

from swift.core.errors import ConfigError
from swift.parallel.layout import AXES, Layout


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pp=2, tp=2), Layout(2, 3, 2, 2, 2, ep=4), Layout(dp_replicate=2, dp_shard=4)],
    ids=layout_id,
)
def test_coordinates_count_through_the_layout(layout):
    places = itertools.product(*(range(getattr(layout, axis)) for axis in AXES))
    for rank, place in enumerate(places):
        found = layout.coordinates(rank)
        assert tuple(getattr(found, axis) for axis in AXES) == place
        assert layout.rank_of(found) == rank
        assert layout.data_rank(rank) == place[1] * layout.dp_shard + place[2]
    assert rank == layout.world_size - 1
    with pytest.raises(ValueError, match="is not one of"):
        layout.coordinates(layout.world_size)


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="cannot share the experts"):
        Layout(dp_replicate=4, tp=2, ep=4)
    with pytest.raises(ConfigError, match="a size of 0"):
        Layout(tp=0)
    assert Layout(dp_shard=2, tp=2, ep=4).world_size == 4


LAYOUT = Layout(dp_replicate=1, dp_shard=2, cp=1, tp=2)


def _places(rank):
    mesh = mesh_of(LAYOUT)
    here = LAYOUT.coordinates(rank)
    assert all(mesh[axis].get_local_rank() == getattr(here, axis) for axis in AXES)
    assert mesh["dp"].get_local_rank() == LAYOUT.data_rank(rank)
    total = torch.tensor([float(rank)])
    distributed.all_reduce(total, group=mesh["tp"].get_group())
    return total.item(), mesh["dp_shard_cp"].size(), mesh["dp_cp"].get_local_rank()


def test_mesh_agrees_with_the_layout():
    assert pool(4).run(_places) == [(1.0, 2, 0), (1.0, 2, 0), (5.0, 2, 1), (5.0, 2, 1)]


def _fail_on_one(rank):
    if rank == 1:
        raise ValueError("what is wrong")
    distributed.barrier()


def _sleep(rank):
    if rank == 0:
        time.sleep(60)


def _wait(rank):
    distributed.barrier()


def _die(rank):
    os._exit(1)


def test_pool_tells_what_went_wrong():
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 raised.*what is wrong.*rank 0 waited for it.*barrier"):
        pool(2).run(_fail_on_one)
    pool(2).run(_wait)  # new processes, which have to read this module first
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 did not end in 3 s.*in _sleep"):
        pool(2).run(_sleep, seconds=3)
    with pytest.raises(RanksFailed, match="the process died"):
        pool(2).run(_die)
