"""The tuners as a table: what PEFT calls them, which of our options they read, what they cost.

A PEFT method more is one row here (and one value of ``tuner_type``). Imports no torch: the planner counts from it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError
from swift.tuners.kept import (
    Kept,
    keep_adalora,
    keep_bone,
    keep_butterfly,
    keep_change,
    keep_dora,
    keep_frequencies,
    keep_output,
    keep_ranks,
    keep_rotation,
    keep_vera,
)

__all__ = [
    "METHODS",
    "MOST_MERGED_BYTES",
    "Method",
    "check_peft",
    "count_decoder_layer",
    "count_layer",
    "kept_bytes",
    "peft_method",
    "peft_method_of_folder",
    "reads_input",
]

Count = Callable[[int, int, TunerSection], int]

MOST_MERGED_BYTES = 2 << 30
"""Up to here LoRA samples answers with a second copy of the weights that it adapts (`swift.tuners.merged`)."""


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Attributes:
        config: PEFT's configuration class.
        peft_type: how ``adapter_config.json`` calls it.
        paper: arXiv number, or where it was published.
        count: trained parameters of one linear layer, from its inputs and outputs.
        options: PEFT's field -> our option.
        fixed: PEFT's field -> value.
        takes_packed: works on weights of 4 bits, whose matrix is packed into another shape.
        keeps: what one linear layer's adapter keeps for the backward pass beside the layer's input: (bytes of a token,
            bytes however many tokens there are), see ``kept.py``. What dropout adds is not in it.
    """

    config: str
    peft_type: str
    paper: str
    count: Count
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    takes_packed: bool = True
    keeps: Kept = keep_ranks


def _lora(inputs: int, outputs: int, tuner: TunerSection) -> int:
    """A [rank, inputs], B [outputs, rank] (arXiv 2106.09685), and DoRA's length of each row."""
    return tuner.lora_rank * (inputs + outputs) + (outputs if tuner.use_dora else 0)


def _oft(inputs: int, outputs: int, tuner: TunerSection) -> int:
    """A skew-symmetric matrix for each block; sizes that do not divide the inputs become the nearest that do."""
    size = tuner.oft_block_size
    if inputs % size:
        lower = next(number for number in range(size, 0, -1) if inputs % number == 0)
        higher = next((number for number in range(size, inputs + 1) if inputs % number == 0), inputs)
        size = inputs if size >= inputs else lower if size - lower <= higher - size else higher
    return inputs // size * (size * (size - 1) // 2)


def _boft(inputs: int, outputs: int, tuner: TunerSection) -> int:
    """Butterfly factors of blocks [size, size], and a scale of each output."""
    size = tuner.boft_block_size or inputs // tuner.boft_block_num
    return tuner.boft_n_butterfly_factor * (inputs // size) * size * size + outputs


def _factors(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to its root, the smaller one first."""
    small = next(factor for factor in range(int(number**0.5), 0, -1) if number % factor == 0)
    return small, number // small


def _lokr(inputs: int, outputs: int, tuner: TunerSection) -> int:
    """W1 [out1, in1] and W2 [out2, in2], the latter of two low-rank factors where that is smaller."""
    (out1, out2), (in1, in2) = _factors(outputs), _factors(inputs)
    rank = tuner.lora_rank
    second = rank * (out2 + in2) if rank < max(out2, in2) / 2 else out2 * in2
    return out1 * in1 + second


_LORA = Method(
    "LoraConfig",
    "LORA",
    "2106.09685",
    _lora,
    {
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
    },
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": _LORA,
        "adalora": Method(
            "AdaLoraConfig",
            "ADALORA",
            "2303.10512",
            lambda inputs, outputs, tuner: tuner.adalora_init_r * (inputs + outputs + 1),
            {
                "init_r": "adalora_init_r",
                "target_r": "adalora_target_r",
                "tinit": "adalora_tinit",
                "tfinal": "adalora_tfinal",
                "deltaT": "adalora_delta_t",
                "beta1": "adalora_beta1",
                "beta2": "adalora_beta2",
                "orth_reg_weight": "adalora_orth_reg_weight",
                "lora_alpha": "lora_alpha",
                "lora_dropout": "lora_dropout",
            },
            keeps=keep_adalora,
        ),
        "vera": Method(
            "VeraConfig",
            "VERA",
            "2310.11454",
            lambda inputs, outputs, tuner: tuner.vera_rank + outputs,
            {
                "r": "vera_rank",
                "projection_prng_key": "vera_projection_prng_key",
                "vera_dropout": "vera_dropout",
                "d_initial": "vera_d_initial",
            },
            keeps=keep_vera,
        ),
        "oft": Method(
            "OFTConfig",
            "OFT",
            "2306.07280",
            _oft,
            {"oft_block_size": "oft_block_size"},
            {"r": 0},
            keeps=keep_rotation,
        ),
        "boft": Method(
            "BOFTConfig",
            "BOFT",
            "2311.06243",
            _boft,
            {
                name: name
                for name in (
                    "boft_block_size",
                    "boft_block_num",
                    "boft_n_butterfly_factor",
                    "boft_dropout",
                )
            },
            keeps=keep_butterfly,
        ),
        "ia3": Method(
            "IA3Config",
            "IA3",
            "2205.05638",
            lambda inputs, outputs, tuner: outputs,
            keeps=keep_output,
        ),
        "loha": Method(
            "LoHaConfig",
            "LOHA",
            "2108.06098",
            lambda inputs, outputs, tuner: 2 * tuner.lora_rank * (inputs + outputs),
            {"r": "lora_rank", "alpha": "lora_alpha"},
            takes_packed=False,
            keeps=keep_change,
        ),
        "lokr": Method(
            "LoKrConfig",
            "LOKR",
            "2212.10650",
            _lokr,
            {"r": "lora_rank", "alpha": "lora_alpha"},
            takes_packed=False,
            keeps=keep_change,
        ),
        "fourierft": Method(
            "FourierFTConfig",
            "FOURIERFT",
            "2405.03003",
            lambda inputs, outputs, tuner: tuner.fourier_n_frequency,
            {"n_frequency": "fourier_n_frequency", "scaling": "fourier_scaling"},
            keeps=keep_frequencies,
        ),
        "bone": Method(
            "MissConfig",
            "MISS",
            "2409.15371",
            lambda inputs, outputs, tuner: tuner.lora_rank * outputs,
            {"r": "lora_rank"},
            keeps=keep_bone,
        ),
    }
)


def peft_method(tuner: TunerSection) -> Method | None:
    """The method that PEFT carries out; None where our own code does."""
    own = tuner.tuner_type == "lora" and not tuner.use_dora
    return None if own else METHODS.get(tuner.tuner_type)


def check_peft(tuner: TunerSection) -> None:
    """Raise ConfigError when PEFT carries the tuner out and is not installed."""
    if peft_method(tuner) is None or importlib.util.find_spec("peft") is not None:
        return
    option = "--use_dora" if tuner.use_dora else f"--tuner_type {tuner.tuner_type}"
    raise ConfigError(
        "peft is not installed",
        where=option,
        why="this tuner is PEFT's own; plain LoRA needs no package",
        fix="pip install 'swift-forge[tuners]'",
    )


def peft_method_of_folder(config: Mapping[str, Any]) -> Method | None:
    """The method that PEFT has to load, from ``adapter_config.json``; None: our LoRA layer reads it, or nobody."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return _LORA if config.get("use_dora") else None
    return next((method for method in METHODS.values() if method.peft_type == kind), None)


def count_layer(name: str, inputs: int, outputs: int, tuner: TunerSection) -> int:
    """Trained parameters of the adapter on the linear layer ``name``."""
    if tuner.tuner_type == "ia3" and name.rpartition(".")[2] in tuner.ia3_feedforward_modules:
        return inputs
    return METHODS[tuner.tuner_type].count(inputs, outputs, tuner)


def count_decoder_layer(hidden_size: int, tuner: TunerSection) -> int:
    """Trained parameters that ReFT or the bottleneck adapter puts behind one decoder layer."""
    if tuner.tuner_type == "reft":  # R and W [rank, hidden], b [rank] (arXiv 2404.03592)
        return tuner.reft_rank * (2 * hidden_size + 1)
    width = tuner.adapter_length  # down [width, hidden] and up [hidden, width] with biases (arXiv 1902.00751)
    return width * (2 * hidden_size + 1) + hidden_size


def kept_bytes(
    name: str, inputs: int, outputs: int, tuner: TunerSection, size: int, on_device: bool
) -> tuple[float, float]:
    """What the adapter of the linear layer ``name`` keeps for the backward pass: (bytes of a token, other bytes).

    Dropout: our layer keeps its mask, one byte an input (two on the CPU); PEFT's also what was left of the input, and
    on the CPU its mask is of float32.
    """
    method, own = METHODS[tuner.tuner_type], peft_method(tuner) is None
    keeps = keep_dora if tuner.use_dora else method.keeps
    token, once = keeps(inputs, outputs, tuner, size)
    if tuner.tuner_type == "ia3" and reads_input(name, tuner, size):
        return 0.0, 0.0  # it scales the input, which is kept as it is
    if own and _starts_elsewhere(tuner):  # the start is subtracted by a second adapter in one product
        return 2 * token + _mask(tuner, on_device, 2) * inputs, once + 8 * tuner.lora_rank * (
            inputs + outputs
        )
    if own:
        return token + _mask(tuner, on_device, 2) * inputs, once
    if "lora_dropout" in method.options.values():
        copied = size if tuner.lora_dropout or size < 4 else 0
        return token + (copied + _mask(tuner, on_device, 4)) * inputs, once
    return token, once


def reads_input(name: str, tuner: TunerSection, size: int) -> bool:
    """Whether the adapter of a linear layer keeps the layer's input itself."""
    kind, method = tuner.tuner_type, peft_method(tuner)
    if kind == "ia3":
        return name.rpartition(".")[2] in tuner.ia3_feedforward_modules
    if kind in ("bone", "vera"):
        return tuner.init_weights == "bat"
    drops = method is not None and "lora_dropout" in method.options.values()
    return not (drops and (tuner.lora_dropout or size < 4))  # else it keeps a copy


def _mask(tuner: TunerSection, on_device: bool, on_cpu: int) -> int:
    return 0 if not tuner.lora_dropout else 1 if on_device else on_cpu


def _starts_elsewhere(tuner: TunerSection) -> bool:
    return tuner.init_weights.startswith("pissa") or tuner.init_weights in ("olora", "lora-ga")
