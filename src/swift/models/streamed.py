"""Weights read part by part: a model is built without any, is divided, and then every rank reads its own parts of the
files. No process ever holds the whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ModelError
from swift.models.load import find_class, loading_options
from swift.models.quantised import check_loadable, check_packages, loading_config
from swift.models.quantised_shards import PackedLinear, quantise

__all__ = ["empty_model", "fill", "has_no_weights"]

_KEPT_IN_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Where classes of transformers name modules that they load in another precision than the rest."""

Part = Sequence[tuple[int, int]]
"""Of each dimension the first place and the number of places."""


def empty_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    device: str = "cpu",
    quantization: QuantizationSection | None = None,
) -> Any:
    """The causal language model of a folder on the meta device; None when its files do not hold its parameters as they
    are (quantised, stored under other names or in other pieces, code of its own). Experts may be stored one by one.

    Args:
        device: where the weights will be.
        quantization: of 4 bits by bitsandbytes, or none.
    """
    model_class, config = find_class(folder, False)
    if getattr(config, "quantization_config", None) is not None:
        return None
    if not model_class.__name__.endswith("ForCausalLM"):
        return None
    if dtype != torch.float32 and any(getattr(model_class, name, None) for name in _KEPT_IN_FLOAT32):
        return None
    quantization = quantization or QuantizationSection()
    check_packages(quantization)
    check_loadable(config.to_dict(), device.partition(":")[0], quantization, str(folder))
    with torch.device("meta"):
        options = loading_options(attention, config, folder, dtype=dtype, device=device)
        model = model_class._from_config(config, dtype=dtype, **options)
    model.tie_weights()
    stored = set(model.state_dict())
    wanted = {name for name, _ in model.named_parameters()}
    wanted |= {name for name, _ in model.named_buffers() if name in stored}
    with _Files(folder, config.model_type) as files:
        if not all(files.has(name) for name in wanted):
            return None
    settings = loading_config(quantization, dtype)
    if settings is not None:
        _quantise_later(model, settings, dtype)
    model.config.use_cache = False
    return model.eval()


def _quantise_later(model: Any, settings: Any, dtype: torch.dtype) -> None:
    """Put layers of 4 bits in the places where transformers would."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            for parameter in layer.parameters():  # transformers makes them in float32
                parameter.data = parameter.data.to(dtype)
            model.set_submodule(name, PackedLinear(layer))


def has_no_weights(model: nn.Module) -> bool:
    """True for a model of `empty_model` that is not filled yet."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def fill(model: Any, folder: Path, device: torch.device) -> int:
    """Read what is missing of the model, of DTensors this rank's parts, from the files of ``folder``.

    Layers of 4 bits are quantised one after another, each as a whole, of which this rank keeps its parts.

    Returns:
        How many bytes were read.

    Raises:
        ModelError: a stored tensor has another shape than the model's.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
    with _Files(folder, model.config.model_type) as files:
        for path, module in model.named_modules():
            if isinstance(module, PackedLinear) and module.packed.is_meta:
                matrix = files.read(_stored_name(f"{path}.weight"), (module.out_features, module.in_features))
                _set_all(module, quantise(module, matrix.to(device=device, dtype=module.dtype)))
            for name, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                if parameter not in filled:
                    value = _own(parameter, files.reader(_stored_name(f"{path}.{name}"), parameter), device)
                    filled[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                module._parameters[name] = filled[parameter]
            missing = {
                name: buffer
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta
            }
            for name, buffer in missing.items():
                if name in module._non_persistent_buffers_set:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                else:
                    module._buffers[name] = _own(
                        buffer, files.reader(_stored_name(f"{path}.{name}"), buffer), device
                    )
            if missing.keys() & module._non_persistent_buffers_set:
                _compute_buffers(model, module)
        return files.bytes_read


def _compute_buffers(model: Any, module: nn.Module) -> None:
    """What follows from the configuration (frequencies of rotary embeddings, scales); weights stay as they are."""
    weights = dict(module._parameters)
    for name, weight in weights.items():
        if weight is not None:
            module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device="meta"))
    model._init_weights(module)
    module._parameters.update(weights)


def _set_all(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module its parameters and buffers, of DTensors this rank's parts."""
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            like = getattr(module, name)
            part = _own(like, partial(_cut, value), value.device)
            module._parameters[name] = nn.Parameter(part, requires_grad=False)


def _stored_name(name: str) -> str:
    """The name in the file: a linear layer with adapters is called ``base`` below its own name."""
    return name.replace(".base.", ".").lstrip(".")


def _own(like: Any, read: Callable[[Part], Tensor], device: torch.device) -> Tensor:
    """The tensor, or of a DTensor the part that this rank has, in the precision of ``like``."""
    if not hasattr(like, "device_mesh"):
        return read([(0, size) for size in like.shape]).to(device=device, dtype=like.dtype, copy=True)
    from torch.distributed.tensor import DTensor

    places = _own_places(like)
    part = torch.empty([size for _, size in places], dtype=like.dtype, device=device)
    if part.numel():
        part.copy_(read(places))
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _own_places(tensor: Any) -> list[tuple[int, int]]:
    """Which places of a DTensor this rank has: tensor parallelism cuts first, FSDP (strided) its parts thereafter."""
    mesh, places = tensor.device_mesh, [(0, size) for size in tensor.shape]
    cuts = [
        (hasattr(placement, "split_factor"), axis, placement.dim)
        for axis, placement in enumerate(tensor.placements)
        if hasattr(placement, "dim")
    ]
    for _, axis, dim in sorted(cuts):
        start, size = places[dim]
        most = -(-size // mesh.size(axis))
        first = min(most * mesh.get_local_rank(axis), size)
        places[dim] = (start + first, min(most, size - first))
    return places


def _cut(tensor: Tensor, places: Part) -> Tensor:
    return tensor[_slices(places)]


def _slices(places: Part) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in places)


class _Files:
    """The tensors of a folder under the names that they have in the model; open while it is entered.

    Attributes:
        bytes_read: how much of them has been read so far.
    """

    def __init__(self, folder: Path, model_type: str) -> None:
        self.folder, self.bytes_read = folder, 0
        self._places = _places(folder)
        self._experts = _stored_experts(model_type)
        self._open: dict[Path, Any] = {}
        self._closing = ExitStack()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def has(self, name: str) -> bool:
        return name in self._places or all(
            piece in self._places for piece in self._pieces(name, 0) or ["nothing"]
        )

    def _pieces(self, name: str, expert: int) -> list[str]:
        """The tensors that make up one expert's part of a fused weight, one below the other; none: it is no such."""
        for fused, patterns in self._experts.items():
            if name.endswith(fused):
                start = name.removesuffix(fused)
                return [start + pattern.replace("*", str(expert)) for pattern in patterns]
        return []

    def reader(self, name: str, like: Tensor) -> Callable[[Part], Tensor]:
        return lambda places: self.read(name, tuple(like.shape), places)

    def read(self, name: str, shape: tuple[int, ...], places: Part | None = None) -> Tensor:
        """What lies at these places of a tensor that as a whole has this shape."""
        places = places or [(0, size) for size in shape]
        if name in self._places:
            return self._slice(name, shape, places)
        (first, number), (start, size), *columns = places
        count = len(self._pieces(name, 0))
        height = shape[1] // count
        experts = []
        for expert in range(first, first + number):
            rows = []
            for at, piece in enumerate(self._pieces(name, expert)):
                begin, end = max(start - at * height, 0), min(start + size - at * height, height)
                if begin < end:
                    inside = [(begin, end - begin), *columns]
                    rows.append(self._slice(piece, (height, *shape[2:]), inside))
            experts.append(torch.cat(rows))
        return torch.stack(experts)

    def _slice(self, name: str, shape: tuple[int, ...], places: Part) -> Tensor:
        file = self._places[name]
        if file not in self._open:
            self._open[file] = self._closing.enter_context(safe_open(file, "pt"))
        stored = self._open[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ModelError(
                f"{name} has the shape {list(stored.get_shape())}, the model wants {list(shape)}",
                where=str(file),
                fix="check that config.json and the weights belong together",
            )
        part: Tensor = stored[_slices(places)] if shape else self._open[file].get_tensor(name)
        self.bytes_read += part.numel() * part.element_size()
        return part


def _places(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file it is in."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in places.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, "pt") as opened:
        return dict.fromkeys(opened.keys(), single)


def _stored_experts(model_type: str) -> dict[str, list[str]]:
    """End of the name of a fused weight of experts -> ends of the names of what one expert has of it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found = {}
    for one in get_checkpoint_conversion_mapping(model_type) or []:
        steps = [type(step).__name__ for step in getattr(one, "operations", [])]
        plain = all(
            pattern.count("*") == 1 and re.fullmatch(r"[\w.*]+", pattern) for pattern in one.source_patterns
        )
        if steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and plain:
            found[one.target_patterns[0]] = list(one.source_patterns)
    return found
