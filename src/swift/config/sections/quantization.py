"""A base model whose weights are stored in fewer bits and stay frozen."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class QuantizationSection(Section):
    """Quantise the frozen base while it is loaded (QLoRA, arXiv 2305.14314)."""

    quant_method: Literal["bnb", "torchao", "gptq", "awq", "fp8", "w8a8"] | None = option(
        None,
        "How the base is quantised when loaded: bnb (bitsandbytes) or torchao; default: bnb with quant_bits."
        " For swift export: bnb, gptq, awq, fp8 or w8a8.",
        essential=True,
    )
    quant_bits: int | None = option(
        None,
        "Bits of a quantised weight: 4 or 8; default: 4 with bnb, gptq and awq, else 8.",
        essential=True,
        ge=0,
        le=16,
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit number format of bitsandbytes.")
    bnb_4bit_use_double_quant: bool = option(
        True, "Quantise the 4-bit format's block scales to 8 bits as well (saves 0.37 bits a weight)."
    )
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        None, "Precision in which 4-bit layers multiply; default: torch_dtype."
    )

    qat_bits: int | None = option(
        None, "Full training for weights that will be rounded to 4 or 8 bits (quantisation-aware; torchao)."
    )
    qat_activation_bits: int | None = option(
        None, "With qat_bits: 8 rounds activations as well, for each token."
    )
    qat_group_size: int = option(32, "With qat_bits: weights that share a scale.", ge=1)
    fp8: bool = option(
        False,
        "Full training that multiplies in float8 (torchao; NVIDIA Ada, Hopper or newer; use torch_compile too).",
    )

    @property
    def needs_torchao(self) -> bool:
        """True when torchao changes how a full training computes."""
        return self.fp8 or self.qat_bits is not None

    @property
    def is_active(self) -> bool:
        """True when the base is quantised while it is loaded."""
        return self.quant_method is not None
