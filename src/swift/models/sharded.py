"""Linear layers that hold a share of their matrix (tensor parallelism), for layers of our own to build upon.

Weights that are split over ranks are DTensors, so that optimizers, FSDP and checkpoints know the whole; what is
computed with is this rank's part (`local`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ShardedLinear", "Share", "local"]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Share:
    """What a rank computes of a linear layer.

    Attributes:
        kind: ``column``: some of the outputs from all inputs; ``row``: from some of the inputs a term of all outputs.
        size: ranks that share the layer.
        rows: ``column`` with a weight that every rank holds whole, because there is less to share than ranks: which
            rows of it this one uses. None: the weight is split.
    """

    kind: Literal["column", "row"]
    size: int
    rows: slice | None = None

    def of_outputs(self, tensor: Tensor) -> Tensor:
        """The rank's part of a weight, a bias or LoRA's B, ``[out, ...]``."""
        tensor = local(tensor)
        return tensor if self.rows is None else tensor[self.rows]

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What the rank adds; the terms of ``row`` are added up, and with them their biases."""
        if bias is None:
            return None
        return self.of_outputs(bias) if self.kind == "column" else local(bias) / self.size


class ShardedLinear(nn.Linear):
    """A linear layer of which every rank computes its share; it takes over the layer's parameters."""

    def __init__(self, linear: nn.Linear, share: Share) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.share = share

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that this rank computes with."""
        return self.share.of_outputs(self.weight), self.share.bias(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.parts())
