"""Which weights are trained."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option

WHOLE_MODEL = ("full", "llamapro")
"""Tuners whose result is a whole model."""
UNMERGEABLE = ("reft", "adapter")
"""Tuners whose adapter is no change of a weight, so that it cannot be merged."""


class TunerSection(Section):
    """LoRA, other adapters or full training, and what stays frozen."""

    tuner_type: Literal[
        "lora",
        "full",
        "adalora",
        "vera",
        "oft",
        "boft",
        "ia3",
        "loha",
        "lokr",
        "fourierft",
        "bone",
        "reft",
        "adapter",
        "llamapro",
    ] = option("lora", "Training method.", essential=True)
    lora_rank: int = option(8, "Rank of LoRA, LoHa, LoKr and Bone.", essential=True, ge=1)
    lora_alpha: float = option(
        32, "LoRA scale numerator: updates are scaled by alpha / rank.", essential=True, gt=0
    )
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: list[str] = option(
        ["all-linear"], "Modules that get an adapter: all-linear, or ends of module names.", essential=True
    )
    target_regex: str | None = option(
        None, "Regular expression over full module names; replaces target_modules."
    )
    modules_to_save: list[str] = option([], "Modules trained in full and stored with the adapter.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732).")
    lora_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Storage precision of LoRA weights."
    )
    use_dora: bool = option(
        False, "Train length and direction of each row of the weight apart (DoRA, arXiv 2402.09353)."
    )
    init_weights: str = option(
        "default",
        "Start of the adapter: default, gaussian, pissa, pissa_niter_N, olora, eva, lora-ga or loftq; "
        "with bone also bat.",
    )
    target_parameters: list[str] = option(
        [], "Parameters that get LoRA themselves: ends of names of fused experts (mlp.experts.down_proj)."
    )
    longlora_group_size: int = option(
        0,
        "LoRA: a token sees no others in training than those of its group of this size, shifted by half of it for "
        "half of the heads (LongLoRA, arXiv 2309.12307); 0: all before it.",
        unit="tokens",
        ge=0,
    )
    lora_ga_batch_size: int = option(2, "LoRA-GA: samples a batch of the gradient estimate.", ge=1)
    lora_ga_iters: int = option(2, "LoRA-GA: batches of the gradient estimate.", ge=1)
    lora_ga_max_length: int = option(
        1024, "LoRA-GA: longest sample of the gradient estimate.", unit="tokens", ge=1
    )
    lora_ga_direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option(
        "ArB2r", "LoRA-GA: which singular vectors A and B get."
    )
    lora_ga_scale: Literal["gd", "unit", "stable", "weightS"] = option(
        "stable", "LoRA-GA: how the start is scaled."
    )
    lora_ga_stable_gamma: float = option(16, "LoRA-GA: divisor of the scale stable.", gt=0)
    adalora_target_r: int = option(8, "AdaLoRA: mean rank in the end.", ge=1)
    adalora_init_r: int = option(12, "AdaLoRA: rank in the beginning.", ge=1)
    adalora_tinit: int = option(0, "AdaLoRA: steps before ranks shrink.", unit="steps", ge=0)
    adalora_tfinal: int = option(0, "AdaLoRA: steps with the final ranks.", unit="steps", ge=0)
    adalora_delta_t: int = option(1, "AdaLoRA: steps between two reductions.", unit="steps", ge=1)
    adalora_beta1: float = option(0.85, "AdaLoRA: smoothing of the sensitivity.", gt=0, lt=1)
    adalora_beta2: float = option(0.85, "AdaLoRA: smoothing of its uncertainty.", gt=0, lt=1)
    adalora_orth_reg_weight: float = option(0.5, "AdaLoRA: weight of the orthogonality penalty.", ge=0)
    vera_rank: int = option(256, "VeRA: rank of the shared random matrices.", ge=1)
    vera_projection_prng_key: int = option(0, "VeRA: seed of the shared random matrices.", ge=0)
    vera_dropout: float = option(0.0, "VeRA: dropout on the adapter's input.", ge=0, lt=1)
    vera_d_initial: float = option(0.1, "VeRA: start of the scales.")
    oft_block_size: int = option(32, "OFT: size of the rotated blocks.", ge=2)
    boft_block_size: int = option(4, "BOFT: size of the rotated blocks; 0: set by boft_block_num.", ge=0)
    boft_block_num: int = option(0, "BOFT: number of blocks a layer; 0: set by boft_block_size.", ge=0)
    boft_n_butterfly_factor: int = option(1, "BOFT: number of butterfly factors.", ge=1)
    boft_dropout: float = option(0.0, "BOFT: share of blocks that are not rotated in a step.", ge=0, lt=1)
    ia3_feedforward_modules: list[str] = option(
        ["down_proj", "fc2", "c_proj", "dense_4h_to_h"],
        "IA3: last parts of names of layers whose inputs are scaled; of others the outputs are.",
    )
    fourier_n_frequency: int = option(2000, "FourierFT: trained frequencies a layer.", ge=1)
    fourier_scaling: float = option(300.0, "FourierFT: scale of the update.", gt=0)
    reft_rank: int = option(4, "ReFT: dimensions of the edited subspace.", ge=1)
    reft_layers: list[int] = option(
        [], "ReFT: numbers of the decoder layers that are edited; all when empty."
    )
    adapter_length: int = option(128, "Adapter: width of the bottleneck.", ge=1)
    adapter_act: Literal["gelu", "relu", "silu", "tanh"] = option("gelu", "Adapter: activation.")
    llamapro_num_new_blocks: int = option(4, "LLaMA-Pro: decoder layers that are added.", ge=1)
    llamapro_num_groups: int | None = option(
        None,
        "LLaMA-Pro: groups of layers behind each of which new ones stand (default: one for each new layer).",
        ge=1,
    )
    lisa_activated_layers: int = option(
        0, "Full training: decoder layers trained at a time, drawn anew again and again (LISA); 0: all.", ge=0
    )
    lisa_step_interval: int = option(20, "LISA: steps between two draws.", unit="steps", ge=1)
    freeze_parameters: list[str] = option(
        [], "Full training: freeze parameters whose name starts with one of these."
    )
    freeze_parameters_regex: str | None = option(None, "Full training: freeze parameters whose name matches.")
    freeze_parameters_ratio: float = option(
        0.0, "Full training: freeze this share of the parameters, from the input side.", ge=0, le=1
    )
    trainable_parameters: list[str] = option(
        [], "Full training: keep trainable in spite of the freeze options (starts of names)."
    )
    trainable_parameters_regex: str | None = option(None, "Full training: the same by regular expression.")

    @property
    def trains_whole_model(self) -> bool:
        """The result is a model folder, not an adapter."""
        return self.tuner_type in WHOLE_MODEL

    @property
    def can_merge(self) -> bool:
        """The result is an adapter that can be added to the weights of its base."""
        return self.tuner_type not in (*WHOLE_MODEL, *UNMERGEABLE)
