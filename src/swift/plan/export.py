"""What ``swift export`` will do and need, by formula. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swift.config.bind import load_run_config
from swift.config.export_rules import DEFAULT_CALIBRATION, METHODS
from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.core.files import free_bytes
from swift.models.facts import ModelFacts
from swift.plan.analytic import CONTEXT_BYTES, DTYPE_BYTES, LinearShape
from swift.plan.device import DeviceFacts
from swift.plan.modules import linear_layers, parameter_sizes
from swift.plan.quantised import layer_bytes
from swift.plan.rows import RowPlan
from swift.runs.folder import RunFolder

__all__ = ["export_plan", "source_of", "stored_bytes"]

_PROBE_TOKENS = 1024
"""Longest text that two models are compared on."""
_DEFAULT_LENGTH = 2048


def source_of(resolved: Resolved) -> tuple[Path | None, Resolved | None, bool]:
    """(folder of the full-precision model, configuration of its run, whether an adapter is merged into it).

    Nothing is loaded or downloaded; (None, None, ...) when it is not on this disk.
    """
    section = resolved.config.model
    name = section.adapters[0] if section.adapters else section.model
    folder = Path(name or "").expanduser()
    if not name or not folder.is_dir():
        return None, None, bool(section.adapters)
    run = RunFolder(folder)
    source = (
        folder if _is_model(folder) or _is_adapter(folder) else run.marked("last") or run.latest_checkpoint()
    )
    if source is None:
        return None, None, False
    try:
        recorded: Resolved | None = load_run_config(source)
    except SwiftError:
        recorded = None
    if not _is_adapter(source):
        return source, recorded, False
    base = (
        section.model
        if section.adapters and section.model
        else recorded.config.model.model
        if recorded
        else None
    )
    return (Path(base).expanduser() if base and _is_model(Path(base).expanduser()) else None), recorded, True


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def stored_bytes(resolved: Resolved, facts: ModelFacts, layers: Sequence[LinearShape], dtype: str) -> int:
    """Bytes of the result's weights: the linear layers quantised, all else in ``dtype``.

    GPTQ and AWQ: bits, and for each group a 16-bit scale and a zero point; GPTQ also the group of each input (int32).
    FP8 and W8A8: a byte each and a scale for each row.
    """
    section = resolved.config.quantization
    width = DTYPE_BYTES.get(dtype, 4)
    quantised = sum(layer.inputs * layer.outputs for layer in layers)
    rest = (facts.num_parameters - quantised) * width
    name, bits = section.quant_method or "", section.quant_bits or 16
    if name == "bnb":
        return rest + sum(layer_bytes(layer, section) for layer in layers)
    if name not in METHODS:
        return facts.num_parameters * width
    total = rest
    for layer in layers:
        total += layer.inputs * layer.outputs * bits // 8
        if METHODS[name].grouped:
            size = resolved.config.export.group_size
            groups = -(-layer.inputs // size) if size > 0 else 1
            total += groups * layer.outputs * 2 + groups * layer.outputs * bits // 8
            total += 4 * layer.inputs if name == "gptq" else 0
        else:
            total += layer.outputs * width
    return total


def export_plan(
    resolved: Resolved,
    facts: ModelFacts | None,
    folder: Path | None,
    device: DeviceFacts,
    warnings: list[str],
    read_rows: Callable[[], RowPlan],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The export part of a plan, and its memory and disk; adds to ``warnings``.

    Args:
        read_rows: counts the rows of ``dataset`` and tokenises some of them.
    """
    section, recorded = resolved.config.data, source_of(resolved)[1]
    rows_from = ", ".join(section.dataset) or None
    if not section.dataset and recorded is not None:
        section.dataset = recorded.config.data.dataset
        rows_from = f"{', '.join(section.dataset)} (training data of the run)"
    method = METHODS.get(resolved.config.quantization.quant_method or "")
    rows = read_rows() if method is not None and method.calibrated and section.dataset else RowPlan()
    if facts is None:
        return _part(resolved, None, [], "float32", rows, rows_from, warnings), {}
    dtype = resolved.config.model.torch_dtype
    stored = (facts.dtype or "float32") if dtype == "auto" else dtype
    layers = linear_layers(facts, parameter_sizes(folder))
    part = _part(resolved, facts, layers, stored, rows, rows_from, warnings)
    return part, _memory(resolved, facts, part, device.kind, device.memory_bytes)


def _part(
    resolved: Resolved,
    facts: ModelFacts | None,
    layers: Sequence[LinearShape],
    dtype: str,
    rows: RowPlan,
    rows_from: str | None,
    warnings: list[str],
) -> dict[str, Any]:
    """Method, toolchain, calibration, sizes; adds a warning for each thing that a run would refuse."""
    name = resolved.config.quantization.quant_method
    method = METHODS.get(name or "")
    options = resolved.config.export
    part: dict[str, Any] = {
        "method": name or "merge",
        "merges": source_of(resolved)[2],
        "output_format": options.output_format,
    }
    if method is not None:
        part["bits"] = resolved.config.quantization.quant_bits
        if method.grouped:
            part["group_size"] = options.group_size
        part["toolchain"] = method.toolchain
        part["toolchain_installed"] = _is_installed(method.toolchain)
        if method.toolchain and not part["toolchain_installed"]:
            warnings.append(
                f"the toolchain {method.toolchain} is not installed: swift toolchain install {method.toolchain}"
            )
        if method.calibrated:
            part |= _calibration(resolved, rows, rows_from)
    if facts is not None:
        width = DTYPE_BYTES.get(dtype, 4)
        part["bytes_before"] = facts.num_parameters * width
        part["bytes_after"] = stored_bytes(resolved, facts, layers, dtype)
        kept = facts.num_parameters - sum(layer.inputs * layer.outputs for layer in layers)
        part["full_precision_share"] = round(kept / facts.num_parameters, 4) if method else 1.0
    return part


def _calibration(resolved: Resolved, rows: RowPlan, rows_from: str | None) -> dict[str, Any]:
    wanted = resolved.config.export.quant_n_samples
    if rows_from is None:
        return {
            "calibration_rows": wanted,
            "calibration_from": DEFAULT_CALIBRATION,
            "calibration_tokens": None,
        }
    taken = min(wanted, rows.rows) if rows.rows else wanted
    longest = resolved.config.data.max_length or _DEFAULT_LENGTH
    lengths = [min(length, longest) for length in rows.lengths]
    mean = sum(lengths) / len(lengths) if lengths else None
    tokens = None if mean is None else round(mean * taken)
    return {"calibration_rows": taken, "calibration_from": rows_from, "calibration_tokens": tokens}


def _is_installed(name: str | None) -> bool:
    from swift.toolchains.toolchain import ToolchainError, find_toolchain

    try:
        return name is None or find_toolchain(name) is not None
    except ToolchainError:
        return False


def _memory(
    resolved: Resolved, facts: ModelFacts, part: dict[str, Any], device: str, device_bytes: int | None
) -> dict[str, Any]:
    """Memory and disk. The largest moment is that of the original in memory for the comparison: quantising itself holds
    a layer (GPTQ, AWQ), or what is read and what is made of it."""
    width = part["bytes_before"] // facts.num_parameters
    rows = part.get("calibration_tokens") or 0
    parts = {
        "weights": part["bytes_before"],
        "logits": _PROBE_TOKENS * facts.vocab_size * 4 * 2,
        "calibration": rows * facts.hidden_size * width * 2,
        "context": CONTEXT_BYTES["cpu" if device == "cpu" else "cuda"],
    }
    target = Path(resolved.config.checkpoint.output_dir).expanduser().absolute()
    total = part["bytes_after"] + resolved.config.export.parity_tokens * facts.vocab_size * 4
    total += part["bytes_before"] if part["merges"] else 0
    return {
        "parts": parts,
        "total": sum(parts.values()),
        "device": device,
        "device_bytes": device_bytes,
        "disk": {"total_bytes": total, "free_bytes": free_bytes(target)},
    }
