"""The one table of quantisation methods, and what goes together in ``swift export``. No machine-learning library."""

from __future__ import annotations

from dataclasses import dataclass

from swift.config.schema import Resolved

__all__ = ["DEFAULT_CALIBRATION", "LIBRARY_TEXT", "METHODS", "Method", "check_export"]

LIBRARY_TEXT = "documentation of Python's standard library"
DEFAULT_CALIBRATION = f"{LIBRARY_TEXT} (rows like those the model will see are better: --dataset FILE.jsonl)"
"""What a model of no run is calibrated on when nothing is said."""


@dataclass(frozen=True)
class Method:
    """One way to store a model in fewer bits.

    Attributes:
        bits: what it can store; the first is the default.
        stored_as: ``quant_method`` in the config.json that it writes.
        toolchain: the environment it runs in; None: this one.
        calibrated: it looks at data.
        grouped: ``group_size`` applies.
        vllm: vLLM loads it.
        max_perplexity_increase: accepted when nobody says otherwise, by bits.
    """

    bits: tuple[int, ...]
    stored_as: str
    toolchain: str | None
    calibrated: bool
    grouped: bool
    vllm: bool
    max_perplexity_increase: dict[int, float]


METHODS: dict[str, Method] = {
    "bnb": Method((4, 8), "bitsandbytes", None, False, False, False, {4: 0.15, 8: 0.03}),
    "gptq": Method((4, 8), "gptq", "gptqmodel", True, True, True, {4: 0.1, 8: 0.02}),
    "awq": Method((4,), "awq", "gptqmodel", True, True, True, {4: 0.1}),
    "fp8": Method((8,), "compressed-tensors", "llmcompressor", False, False, True, {8: 0.02}),
    "w8a8": Method((8,), "compressed-tensors", "llmcompressor", True, False, True, {8: 0.03}),
}
"""A further format (GGUF) is one row here and one function in ``swift.quantize.methods``; until then its name stands in
aliases.yaml, which says what to do instead."""


_OF_BNB = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


def check_export(resolved: Resolved) -> None:
    """Raise ConfigError for what ``swift export`` cannot do (a warning in a plan)."""
    if resolved.command != "export":
        return
    quantisation, options = resolved.config.quantization, resolved.config.export
    name, bits = quantisation.quant_method, quantisation.quant_bits
    if name is None:
        if not options.merge_lora:
            return resolved.refuse(
                "swift export",
                "nothing to do",
                fix=f"--quant_method {', '.join(METHODS)}; or --merge_lora true",
            )
        _refuse_unused(resolved, None)
        return
    method = METHODS.get(name)
    if method is None:
        return resolved.refuse(
            "quant_method",
            f"{name} quantises a base while it is loaded; it writes no model folder",
            fix=f"--quant_method {', '.join(METHODS)}",
        )
    if bits not in method.bits:
        return resolved.refuse(
            "quant_bits",
            f"{name} stores {' or '.join(map(str, method.bits))} bits, not {bits}",
            fix=f"--quant_bits {method.bits[0]}",
        )
    if options.output_format == "vllm" and not method.vllm:
        return resolved.refuse(
            "output_format",
            f"vLLM does not load {method.stored_as} folders",
            fix="--quant_method gptq, awq, fp8 or w8a8; or --output_format hf",
        )
    for option in ("group_size", "quant_batch_size"):
        if resolved.value(option) == 0:
            return resolved.refuse(option, "cannot be 0", fix=f"leave --{option} out")
    _refuse_unused(resolved, method)


def _refuse_unused(resolved: Resolved, method: Method | None) -> None:
    """No option without effect."""
    calibrated = method is not None and method.calibrated
    used = {
        "group_size": method is not None and method.grouped,
        "quant_batch_size": calibrated and method is not None and method.toolchain == "gptqmodel",
        "quant_n_samples": calibrated,
        "dataset": calibrated,
        "quant_exclude": method is not None,
        "quantize_lm_head": method is not None,
        **dict.fromkeys(_OF_BNB, method is METHODS["bnb"]),
    }
    name = resolved.config.quantization.quant_method
    for option, is_used in used.items():
        if not is_used and resolved.is_explicit(option):
            return resolved.refuse(
                option,
                f"has no effect with quant_method {name}" if name else "has no effect on a merge",
                fix="leave it out",
            )
