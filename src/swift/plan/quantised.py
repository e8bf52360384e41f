"""Bytes of quantised weights by formula."""

from __future__ import annotations

from collections.abc import Sequence

from swift.config.sections.quantization import QuantizationSection
from swift.models.facts import ModelFacts
from swift.models.quantised import is_unpacked, stored_method
from swift.plan.analytic import LinearShape

__all__ = ["frozen_bytes", "largest_unpacked", "layer_bytes"]

BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes: weights that share a scale, and scales that share one of their own (QLoRA, arXiv 2305.14314)."""
_TABLE_BYTES, _NESTED_TABLE_BYTES = 16 * 4, 256 * 4 + 4
"""The 16 values of a 4-bit format in float32; the 256 of the 8-bit scales, and their offset. Each layer has its own."""


def layer_bytes(layer: LinearShape, section: QuantizationSection) -> int:
    """Bytes of one quantised weight matrix of ``n`` numbers, scales included.

    4 bits: ``n/2``, and a float32 scale for each 64 numbers: 0.5625 bytes a number. Double quantisation stores these
    scales in one byte, with a float32 for each 256 of them: 0.5 + 1/64 + 4/(64 x 256) = 0.5159 bytes a number.
    8 bits: ``n``, and a float32 scale for each row.
    """
    count = layer.inputs * layer.outputs
    if section.quant_bits == 8:
        return count + 4 * layer.outputs
    scales = -(-count // BLOCK)
    packed = -(-count // 2) + _TABLE_BYTES
    if not section.bnb_4bit_use_double_quant:
        return packed + 4 * scales
    return packed + scales + 4 * -(-scales // NESTED_BLOCK) + _NESTED_TABLE_BYTES


def frozen_bytes(
    facts: ModelFacts, layers: Sequence[LinearShape], section: QuantizationSection, compute_bytes: int
) -> int | None:
    """Bytes of a frozen base: the linear layers quantised, all else in the compute precision; None: none is quantised.

    A folder quantised already takes in memory what it takes on disk, unless its weights are unpacked.
    """
    if stored_method(facts.config) is not None:
        return None if is_unpacked(facts.config) else facts.weights_bytes
    if not section.is_active:
        return None
    count = sum(layer.inputs * layer.outputs for layer in layers)
    return (facts.num_parameters - count) * compute_bytes + sum(layer_bytes(one, section) for one in layers)


def largest_unpacked(layers: Sequence[LinearShape], section: QuantizationSection) -> int:
    """Numbers of the largest quantised layer."""
    if not section.is_active:
        return 0
    return max((layer.inputs * layer.outputs for layer in layers), default=0)
