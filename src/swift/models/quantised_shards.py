"""Linear layers of 4 bits whose packed weights may be sharded: bitsandbytes' values and products, plain parameters.

``Linear4bit`` keeps what the bytes mean in attributes of a parameter of its own class, which is lost when FSDP puts
shards in its place. Here bytes and scales are parameters like any other (FSDP2 gathers bytes as they are), and what is
small and the same for all is in buffers. Nothing is quantised anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swift.core.errors import ConfigError
from swift.models.quantised import is_quantised_linear

__all__ = ["PackedLinear", "quantise", "unwrap_quantised"]


class PackedLinear(nn.Module):
    """The layer of a ``bitsandbytes.nn.Linear4bit``, whose tensors it takes over.

    Attributes:
        packed: uint8, two weights in each.
        scales: of each block of weights; of double quantisation uint8, with scales of their own.
        code: the values that four bits stand for; ``nested_code``, ``nested_scales``, ``offset``: of the scales.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor
    nested_code: Tensor
    nested_scales: Tensor
    offset: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        packed, state = layer.weight.data, layer.weight.quant_state
        if state is None:
            packed, state = _quantised(layer.weight.data, layer.weight)
        self.in_features, self.out_features = int(layer.in_features), int(layer.out_features)
        self.compute_dtype: torch.dtype | None = layer.compute_dtype
        self.shape, self.dtype = torch.Size(state.shape), state.dtype
        self.blocksize, self.quant_type = int(state.blocksize), str(state.quant_type)
        self.bias = layer.bias
        self.compress_statistics = bool(state.nested)
        if self.compress_statistics:
            self.nested_blocksize, self.nested_dtype = int(state.state2.blocksize), state.state2.dtype
        for name, tensor in _tensors(packed, state).items():
            if name in ("packed", "scales"):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        inner = None
        if self.compress_statistics:
            inner = QuantState(
                absmax=self.nested_scales,
                code=self.nested_code,
                blocksize=self.nested_blocksize,
                dtype=self.nested_dtype,
            )
        return QuantState(
            absmax=self.scales,
            shape=self.shape,
            code=self.code,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset if self.compress_statistics else None,
            state2=inner,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        import bitsandbytes

        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = bitsandbytes.matmul_4bit(x.to(dtype), self.packed, self._state(), bias=bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_type}"


def quantise(layer: PackedLinear, matrix: Tensor) -> dict[str, Tensor]:
    """The tensors of the layer, by name, for the weights ``matrix [out, in]``."""
    return _tensors(*_quantised(matrix, layer))


def _quantised(matrix: Tensor, like: Any) -> tuple[Tensor, Any]:
    """Bytes and what they mean; of a meta tensor their shapes."""
    from bitsandbytes.functional import quantize_4bit

    if matrix.is_meta:  # the code of scales is made once, where the first matrix is
        quantize_4bit(torch.zeros(like.blocksize, 1), compress_statistics=True)
    return quantize_4bit(
        matrix.contiguous(),
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_type=like.quant_type,
    )


def _tensors(packed: Tensor, state: Any) -> dict[str, Tensor]:
    found = {"packed": packed, "scales": state.absmax, "code": state.code}
    if state.nested:
        found |= {"nested_scales": state.state2.absmax, "nested_code": state.state2.code}
        found["offset"] = torch.as_tensor(state.offset)
    return {name: _plain(tensor) for name, tensor in found.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


def unwrap_quantised(model: nn.Module) -> None:
    """Put a `PackedLinear` in the place of every 4-bit layer of bitsandbytes.

    Raises:
        ConfigError: a layer is quantised in another way.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) or not is_quantised_linear(module):
            continue
        if getattr(getattr(module, "weight", None), "quant_state", None) is None:
            raise ConfigError(
                f"{name} ({type(module).__name__}) cannot be sharded",
                where="--data_parallel_shard_size",
                why="of quantised layers only those of 4 bits by bitsandbytes can",
                fix="--quant_method bnb --quant_bits 4 with the full-precision model, or "
                "--data_parallel_shard_size 1: every process has the whole (small) base",
            )
        model.set_submodule(name, PackedLinear(module))
