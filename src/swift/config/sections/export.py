"""A trained model as other programs want it: merged, quantised, checked."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class ExportSection(Section):
    """Merging, quantising, and how far the result may be from the original."""

    merge_lora: bool = option(
        False,
        "Merge the adapter into its model in full precision (swift merge-lora); before quantising always.",
    )
    output_format: Literal["hf", "vllm"] = option(
        "hf",
        "Who loads the folder: transformers (hf), or vLLM, whose own rules are then checked as well.",
        essential=True,
    )
    group_size: int = option(
        128, "Weights that share a scale (gptq, awq); -1: a whole row.", unit="weights", ge=-1
    )
    quant_n_samples: int = option(
        256, "Calibration rows, drawn from the data at random.", unit="rows", ge=1, essential=True
    )
    quant_batch_size: int = option(
        1,
        "Calibration rows that go through the model together (gptq, awq); -1: all of them.",
        unit="rows",
        ge=-1,
    )
    quant_exclude: list[str] = option(
        [],
        "Modules that stay in full precision (ends of names, such as down_proj); routers of experts always do.",
    )
    quantize_lm_head: bool = option(
        False, "Quantise the output head as well, whose rounding reaches every logit."
    )
    parity_dataset: list[str] = option(
        [],
        "Held-out text that original and result are compared on; default: the validation data of the run, else"
        " documentation of Python's standard library.",
        essential=True,
    )
    parity_tokens: int = option(4096, "Tokens to compare on.", unit="tokens", ge=16)
    max_perplexity_increase: float | None = option(
        None,
        "Exit with 1 when perplexity rises by more than this share (0.01 is 1 %); default: by method and bits.",
        ge=0,
        essential=True,
    )
    max_kl: float | None = option(
        None, "Exit with 1 above this mean KL divergence (original || result).", unit="nats a token", ge=0
    )
    min_agreement: float | None = option(
        None, "Exit with 1 below this share of positions with the same likeliest token.", ge=0, le=1
    )
