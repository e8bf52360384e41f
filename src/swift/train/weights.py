"""A whole model written as transformers writes it, tensor by tensor: of a model in shards never more than one file is
in memory, and only on the rank that writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["FILE_BYTES", "save_gathered"]

Collect = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]

FILE_BYTES = 2 << 30
"""A file is closed when it holds so much."""


def save_gathered(
    model: Any,
    folder: Path | None,
    dtype: torch.dtype,
    collect: Collect,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write ``model`` to ``folder`` in precision ``dtype``; ranks that do not write give None, and all call this.

    ``collect`` gives names and whole tensors, one after another.
    """
    tensors = _gathered(model, dtype, collect, folder is not None)
    if folder is None:
        for _ in tensors:
            pass
        return
    if getattr(
        model, "_weight_conversions", None
    ):  # stored under other names, in other pieces: transformers knows how
        model.save_pretrained(folder, state_dict=dict(tensors))
        return
    _save_config(model, folder)
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        save_file(held, folder / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors:
        number = tensor.numel() * tensor.element_size()
        if held and size + number > file_bytes:
            close()
            size = 0
        held[name] = tensor
        size, total = size + number, total + number
    close()
    _name_files(folder, parts, total)


def _gathered(model: Any, dtype: torch.dtype, collect: Collect, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and stored buffers on the host; without ``keep`` they are gathered for others."""
    stored = set(model.state_dict())
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in collect({name: value.detach() for name, value in named if name in stored}):
        if keep:
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            yield name, tensor.to("cpu").contiguous()


def _name_files(folder: Path, parts: list[list[str]], total: int) -> None:
    if len(parts) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_config(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
