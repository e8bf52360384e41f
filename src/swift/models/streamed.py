"""Weights read part by part: a model is built without any, is sharded, and then every rank reads its own parts of the
files. No process ever holds the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from swift.models.load import choose_attention, find_class

__all__ = ["empty_model", "fill", "has_no_weights"]


def empty_model(folder: Path, *, dtype: torch.dtype, attention: str = "auto") -> Any:
    """The causal language model of a folder on the meta device; None when its files do not hold its parameters as they
    are (quantised, stored under other names or in other pieces, code of its own).
    """
    model_class, config = find_class(folder, False)
    files = _files(folder)
    if not files or getattr(config, "quantization_config", None) is not None:
        return None
    if not model_class.__name__.endswith("ForCausalLM"):
        return None
    implementation = choose_attention(attention, config, folder)
    with torch.device("meta"):
        options = {"attn_implementation": implementation} if implementation else {}
        model = model_class._from_config(config, dtype=dtype, **options)
    model.tie_weights()
    stored = set(model.state_dict())
    wanted = {name for name, _ in model.named_parameters()}
    wanted |= {name for name, _ in model.named_buffers() if name in stored}
    if not wanted <= files.keys():
        return None
    model.config.use_cache = False
    return model.eval()


def has_no_weights(model: nn.Module) -> bool:
    """True for a model of `empty_model` that is not filled yet."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def fill(model: Any, folder: Path, device: torch.device) -> None:
    """Read what is missing of the model, of DTensors this rank's parts, from the files of ``folder``."""
    files = _files(folder)
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in filled:
                stored = _stored_name(f"{path}.{name}" if path else name)
                filled[parameter] = nn.Parameter(
                    _read(parameter, files[stored], stored, device), requires_grad=parameter.requires_grad
                )
            module._parameters[name] = filled[parameter]
        missing = {
            name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta
        }
        for name, buffer in missing.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
            stored = _stored_name(f"{path}.{name}" if path else name)
            if name not in module._non_persistent_buffers_set:
                module._buffers[name].copy_(_read(buffer, files[stored], stored, device))
        if missing.keys() & module._non_persistent_buffers_set:
            model._init_weights(module)  # frequencies of rotary embeddings follow from the configuration


def _stored_name(name: str) -> str:
    """The name in the file: a linear layer with adapters is called ``base`` below its own name."""
    return name.replace(".base.", ".")


def _files(folder: Path) -> dict[str, Path]:
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


def _read(like: Any, file: Path, name: str, device: torch.device) -> Tensor:
    """The tensor, or of a DTensor the part that this rank has, in the precision of ``like``."""
    with safe_open(file, "pt") as opened:
        stored = opened.get_slice(name)
        if not hasattr(like, "device_mesh"):
            whole: Tensor = stored[:] if like.ndim else opened.get_tensor(name)
            return whole.to(device=device, dtype=like.dtype, copy=True)
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, start = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        part = torch.empty(shape, dtype=like.dtype, device=device)
        if part.numel():
            part.copy_(
                stored[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))]
            )
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
