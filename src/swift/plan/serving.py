"""Memory of a server by formula: weights, adapters, and the keys and values of the requests it answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift.config.adapter_names import split_name
from swift.config.schema import Resolved
from swift.core.format import format_bytes
from swift.models.facts import ModelFacts
from swift.plan.analytic import CONTEXT_BYTES, DTYPE_BYTES
from swift.plan.device import DeviceFacts
from swift.plan.modules import linear_layers
from swift.plan.quantised import frozen_bytes
from swift.plan.sampling import cache_bytes_per_token
from swift.runs.folder import RunFolder

__all__ = ["base_of_adapter", "serving_fits", "serving_memory"]


def serving_memory(resolved: Resolved, facts: ModelFacts, device: DeviceFacts, dtype: str) -> dict[str, Any]:
    """The memory part of a plan. The cache is as large as ``max_num_seqs`` requests of full length need, unless an
    option or the device says less; what is the least to answer one such request stands in ``least``."""
    options, size = resolved.config.engine, DTYPE_BYTES.get(dtype, 4)
    weights = frozen_bytes(facts, linear_layers(facts, {}), resolved.config.quantization, size)
    parts = {
        "context": CONTEXT_BYTES.get(device.kind, CONTEXT_BYTES["cuda"]),
        "weights": facts.num_parameters * size if weights is None else weights,
        "adapters": sum(_adapter_bytes(entry) for entry in resolved.config.model.adapters),
    }
    fixed = sum(parts.values())
    per_token = cache_bytes_per_token(facts, size)
    length = min(options.max_model_len or facts.max_position_embeddings, facts.max_position_embeddings)
    wanted = options.max_num_seqs * length
    tokens = min(wanted, options.max_cache_tokens or wanted)
    if device.memory_bytes is not None and options.max_cache_tokens is None:
        room = int(device.memory_bytes * options.memory_utilization) - fixed
        tokens = max(min(length, 64), min(tokens, room // per_token))
    parts["cache"] = tokens * per_token
    return {
        "parts": parts,
        "total": sum(parts.values()),
        "device": device.kind,
        "device_bytes": device.memory_bytes,
        "cache": {
            "bytes_per_token": per_token,
            "tokens": tokens,
            "max_model_len": length,
            "full_length_requests": round(tokens / length, 1),
        },
        "least": fixed + min(tokens, length) * per_token,
    }


def serving_fits(memory: dict[str, Any], share: float, warnings: list[str]) -> bool | None:
    """Whether one request of full length can be answered with ``share`` of the device; adds a warning if not."""
    size = memory["device_bytes"]
    if size is None or memory["least"] <= share * size:
        return None if size is None else True
    warnings.append(
        f"memory: about {format_bytes(memory['least'])} to answer one request of full length, on a"
        f" {memory['device']} device of {format_bytes(size)}; --max_model_len or --quant_method bnb lowers it"
    )
    return False


def _adapter_bytes(entry: str) -> int:
    folder = _adapter_folder(Path(split_name(entry)[1]).expanduser())
    weights = folder / "adapter_model.safetensors" if folder is not None else None
    return weights.stat().st_size if weights is not None and weights.is_file() else 0


def _adapter_folder(path: Path) -> Path | None:
    """The adapter that a path stands for, or that of a run's last checkpoint; None when there is none (yet)."""
    if (path / "adapter_config.json").is_file():
        return path
    if not path.is_dir():
        return None
    run = RunFolder(path)
    checkpoint = run.marked("last") or run.latest_checkpoint()
    return checkpoint if checkpoint is not None and (checkpoint / "adapter_config.json").is_file() else None


def base_of_adapter(entry: str) -> str | None:
    """The base model that an adapter (or its run) names; None when it cannot be read."""
    folder = _adapter_folder(Path(split_name(entry)[1]).expanduser())
    if folder is None:
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    name = config.get("base_model_name_or_path")
    return str(name) if name else None
