"""Which model, in which precision, on which device."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class ModelSection(Section):
    """The model to train or to use."""

    model: str | None = option(
        None,
        "Model folder on disk (config.json, weights, tokenizer), a run folder, a short name (swift models ls), or"
        " owner/name on a hub, which is downloaded when it is not in the hub's cache.",
        essential=True,
    )
    model_revision: str | None = option(
        None, "Branch, tag or commit of a model on a hub; default: its main branch."
    )
    use_hf: bool | None = option(
        None,
        "Hub: Hugging Face (true) or ModelScope (false); default: USE_HF of the environment, else false.",
    )
    hub_token: str | None = option(
        None, "Token for private and gated models; never recorded. Better: HF_TOKEN or MODELSCOPE_API_TOKEN."
    )
    adapters: list[str] = option(
        [],
        "Adapter folders (or run folders) to load on top of the model; for swift deploy also NAME=FOLDER.",
        essential=True,
    )
    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto", "Compute precision; auto is bfloat16 on devices that have it, float32 on CPU.", essential=True
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Storage precision of trainable weights; auto is float32 (master weights)."
    )
    attn_impl: Literal[
        "auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = option("auto", "Attention implementation; auto takes the fastest exact one on the device.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps, npu, xpu.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model folder.")
