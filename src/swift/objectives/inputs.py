"""What the pure functions ask of their tensors: shapes that fit, and enough precision to add up."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32", "check_shapes"]


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, in which exponentials stay finite and thousands of tokens add up."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_shapes(shape: tuple[int, ...], what: str, **tensors: Tensor | None) -> None:
    """Nothing is broadcast by accident.

    Args:
        shape: that of all ``tensors`` which are not None.
        what: names it in messages, such as ``[batch, tokens]``.

    Raises ValueError with the name of the tensor.
    """
    for name, one in tensors.items():
        if one is not None and tuple(one.shape) != tuple(shape):
            raise ValueError(f"{name} must be {what} = {list(shape)}, not {list(one.shape)}")
