"""Optimizer states by the names of parameters, for any number of ranks: saved by some, loaded by others.

PyTorch's distributed checkpoint keeps every tensor with its place in the whole, so that what four ranks have saved is
read by one, two or three. A key is ``SET/PARAMETER/STATE``; ``SET/PARAMETER/weight`` is the parameter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from swift.core.errors import SwiftError
from swift.parallel.engine import RANKS_FOLDER, ParameterSet

__all__ = ["begin_saving", "load_state", "load_whole", "named_state", "shared"]


def named_state(sets: Mapping[str, ParameterSet]) -> dict[str, Any]:
    """All optimizer states and all trained weights, this rank's parts of them."""
    found: dict[str, Any] = {}
    for set_name, group in sets.items():
        for name, parameter in group.parameters.items():
            found[f"{set_name}/{name}/weight"] = parameter.detach()
            for key, value in group.optimizer.state.get(parameter, {}).items():
                found[f"{set_name}/{name}/{key}"] = value
    return found


def begin_saving(folder: Path, state: dict[str, Any], group: torch.distributed.ProcessGroup | None) -> Any:
    """Copy ``state`` to host memory and write it in a thread; returns a future. Every rank of ``group`` calls this.

    The future is done on a rank when all ranks have written.
    """
    return dcp.async_save(state, checkpoint_id=folder / RANKS_FOLDER, process_group=group)


def load_state(folder: Path, sets: Mapping[str, ParameterSet]) -> None:
    """The reverse of `named_state`, whatever ranks have saved it.

    Raises SwiftError when the checkpoint is of other parameters.
    """
    reader = dcp.FileSystemReader(folder / RANKS_FOLDER)
    stored = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {}
    for set_name, group in sets.items():
        for name, parameter in group.parameters.items():
            prefix = f"{set_name}/{name}/"
            keys = [key for key in stored if key.startswith(prefix)]
            weight = stored.get(f"{prefix}weight")
            if not isinstance(weight, TensorStorageMetadata) or weight.size != parameter.shape:
                raise SwiftError(
                    "the checkpoint is of another model, or of other trained parameters",
                    where=str(folder),
                    why=name,
                )
            for key in keys:
                wanted[key] = _room(stored[key], parameter)
    dcp.load(wanted, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    for set_name, group in sets.items():
        for name, parameter in group.parameters.items():
            prefix = f"{set_name}/{name}/"
            state = {
                key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)
            }
            with torch.no_grad():
                parameter.copy_(state.pop("weight"))
            group.optimizer.state[parameter] = state


def _room(stored: Any, parameter: nn.Parameter) -> Any:
    """Where a stored value goes: as the parameter lies when it has its shape."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=dtype)


def load_whole(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What one process has saved (``optimizer.state_dict()``) into the optimizer of a rank."""
    parameters: dict[int, nn.Parameter] = {}
    for group in optimizer.param_groups:
        numbers = group.get("order") or range(len(parameters), len(parameters) + len(group["params"]))
        parameters |= dict(zip(numbers, group["params"], strict=True))
    for number, values in state["state"].items():
        parameter = parameters[int(number)]
        optimizer.state[parameter] = {key: shared(value, parameter) for key, value in values.items()}


def shared(value: Any, parameter: Tensor) -> Any:
    """The part of a whole state that belongs to this rank's part of the parameter."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
