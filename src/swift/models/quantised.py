"""Frozen base models stored in few bits: quantised while they are loaded, or quantised already on disk.

The layers are the libraries' own (bitsandbytes, torchao, gptqmodel, compressed-tensors); adapters sit on top of them
(QLoRA, arXiv 2305.14314). Nothing here imports a machine-learning library before it is needed.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError, ModelError
from swift.models.facts import read_safetensors_header, weight_files

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "check_loadable",
    "check_packages",
    "dequantised",
    "is_quantised_linear",
    "is_unpacked",
    "linear_sizes",
    "loading_config",
    "num_weights",
    "prepare_stored",
    "settle_layers",
    "stored_method",
    "stored_weights",
]


@dataclass(frozen=True)
class _Needs:
    """What a quantisation method needs: modules to import, what to install, and whether only CUDA has kernels."""

    modules: tuple[str, ...]
    install: str
    cuda_only: bool = False


_ON_LOADING = {
    "bnb": _Needs(("bitsandbytes", "accelerate"), "pip install 'swift-forge[bnb]'"),
    "torchao": _Needs(("torchao", "accelerate"), "pip install 'swift-forge[torchao]'"),
}
_STORED = {
    "bitsandbytes": _ON_LOADING["bnb"],
    "torchao": _ON_LOADING["torchao"],
    "gptq": _Needs(("optimum", "gptqmodel"), "pip install optimum gptqmodel --no-build-isolation"),
    "awq": _Needs(("gptqmodel", "accelerate"), "pip install accelerate gptqmodel --no-build-isolation"),
    "compressed-tensors": _Needs(("compressed_tensors",), "pip install compressed-tensors"),
    "fp8": _Needs(("accelerate",), "pip install accelerate", cuda_only=True),
    "fbgemm_fp8": _Needs(("fbgemm_gpu", "accelerate"), "pip install fbgemm-gpu accelerate", cuda_only=True),
    "mxfp4": _Needs(("kernels", "accelerate"), "pip install kernels accelerate", cuda_only=True),
    "hqq": _Needs(("hqq",), "pip install hqq"),
    "quanto": _Needs(("optimum", "accelerate"), "pip install optimum-quanto accelerate"),
}


def stored_method(config: Mapping[str, Any]) -> str | None:
    """How the weights of a folder are quantised, by its config.json; None when they are not."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    return str(settings.get("quant_method", "bitsandbytes")).lower()


_UNPACKED_ON_WISH = ("fp8", "mxfp4")


def is_unpacked(config: Mapping[str, Any]) -> bool:
    """True when stored quantised weights are turned into plain ones while they are loaded."""
    method = stored_method(config)
    if method in _UNPACKED_ON_WISH:
        return bool(config["quantization_config"].get("dequantize"))
    return method == "compressed-tensors"


def check_packages(section: QuantizationSection) -> None:
    """Raise ConfigError when the library that quantises is not installed."""
    method = "torchao" if section.needs_torchao else section.quant_method
    if method is None:
        return
    needs = _ON_LOADING[method]
    if missing := _missing(needs):
        option = f"quant_method {method}"
        if section.needs_torchao:
            option = "fp8" if section.fp8 else "qat_bits"
        raise ConfigError(
            f"{missing} is not installed",
            where=f"--{option}",
            why="it holds the quantised layers",
            fix=needs.install,
        )


def check_loadable(config: Mapping[str, Any], device: str, section: QuantizationSection, where: str) -> None:
    """Refuse, by config.json alone, a quantised folder that cannot be loaded here.

    Args:
        config: contents of config.json.
        device: kind of device the model goes to.
        section: what the user asks for on top.
        where: for the message.

    Raises:
        ModelError: a package is missing, the device has no kernels, or the method is unknown.
        ConfigError: the folder is quantised and is to be quantised again.
    """
    method = stored_method(config)
    if method is None:
        return
    if section.is_active:
        raise ConfigError(
            f"the model is quantised already ({method})",
            where=f"--quant_method {section.quant_method}",
            fix="leave the quantisation out, or name the full-precision model",
        )
    needs = _STORED.get(method)
    if needs is None:
        raise ModelError(
            f"weights quantised with {method!r} cannot be loaded",
            where=where,
            why=f"known methods: {', '.join(_STORED)}",
            fix="use the full-precision model",
        )
    if needs.cuda_only and device != "cuda" and not is_unpacked(config):
        raise ModelError(
            f"{method} weights need a CUDA device, not {device}",
            where=where,
            why="their matrix products exist as CUDA kernels only",
            fix="use the full-precision model on this machine, or --device cuda on another"
            + (
                '; or set "dequantize": true in quantization_config of its config.json'
                if method in _UNPACKED_ON_WISH
                else ""
            ),
        )
    if missing := _missing(needs):
        raise ModelError(
            f"the model is quantised with {method}, and {missing} is not installed",
            where=where,
            fix=needs.install,
        )


def _missing(needs: _Needs) -> str | None:
    return next((name for name in needs.modules if importlib.util.find_spec(name) is None), None)


def loading_config(
    section: QuantizationSection, dtype: torch.dtype, kept: Sequence[str] | None = None
) -> Any:
    """The quantisation configuration of transformers for a section; None when nothing is to be quantised.

    The output head keeps its precision: its rounding would reach every logit. With ``kept`` (bitsandbytes) the layers
    of these names do, and no others.
    """
    import torch

    if section.quant_method is None:
        return None
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it says at every call which precision it computes in
    if section.quant_method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    skipped = None if kept is None else list(kept)
    if section.quant_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    compute = section.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute) if compute else dtype,
    )


def prepare_stored(config: Any) -> None:
    """Have stored weights loaded in a way that can be trained upon.

    Left to themselves, gptqmodel takes faster kernels that pass no gradient on, and compressed-tensors leaves layers
    without a weight until the model is first used, when it unpacks them all.

    Args:
        config: of a model whose folder may hold quantised weights; changed in place.
    """
    settings = getattr(config, "quantization_config", None)
    method = stored_method({"quantization_config": settings})
    if settings is not None and method in ("gptq", "awq"):
        settings["backend"] = "auto_trainable"
    elif settings is not None and method == "compressed-tensors":
        settings["dequantize"] = True


def settle_layers(model: nn.Module) -> None:
    """Keep 4-bit layers in one layout.

    On CPUs with bfloat16 instructions bitsandbytes repacks a layer at its first evaluation, in place; the repacked
    layer computes in bfloat16 whatever was asked for, and passes no gradient on when training goes on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantised_linear(module: nn.Module) -> bool:
    """True for a linear layer whose weight is not a plain matrix ``[out, in]`` of floating-point numbers."""
    import torch

    outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(outputs, int) or not isinstance(inputs, int) or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return True
    # A FakeTensor stands for a plain one while memory is estimated (`swift.train.memory`), a DTensor for a rank's part.
    is_plain = type(weight.data).__name__ in ("Tensor", "FakeTensor", "DTensor")
    if not is_plain or not weight.is_floating_point() or weight.element_size() == 1:
        return True
    return tuple(weight.shape) != (outputs, inputs)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a quantised linear layer."""
    outputs, inputs = module.out_features, module.in_features
    assert isinstance(outputs, int) and isinstance(inputs, int)
    return outputs, inputs


def dequantised(module: nn.Module) -> torch.Tensor:
    """The matrix ``[out, in]`` that a quantised linear layer multiplies with, in float32.

    Raises:
        ModelError: the layer is not one of bitsandbytes.
    """
    kind = type(module.weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        raise ModelError(
            f"the values of a {type(module).__name__} cannot be read",
            why="only weights that bitsandbytes quantised can be unpacked here",
            fix="--quant_method bnb with the full-precision model, or --init_weights default",
        )
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    matrix: torch.Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    return matrix.detach().float()


def stored_weights(folder: Path) -> Callable[[nn.Module, str], torch.Tensor]:
    """A function from a linear layer of the model and its name to the matrix ``[out, in]`` that ``folder`` holds.

    Each matrix is read when it is asked for: beside a quantised model there may be no room for all of them.

    Raises:
        ModelError: the folder holds no safetensors, or (from the function) no such matrix.
    """
    files = weight_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ModelError("the weights are not stored as safetensors", where=str(folder))
    places = {name: file for file in files for name in read_safetensors_header(file)[0]}

    def read(module: nn.Module, layer: str) -> torch.Tensor:
        from safetensors import safe_open

        names = (
            f"{layer}.weight",
            f"{layer.partition('.')[2]}.weight",
        )  # some leave the model's own prefix out
        name = next((name for name in names if name in places), None)
        if name is None:
            raise ModelError(f"the folder has no tensor {names[0]}", where=str(folder))
        with safe_open(places[name], framework="pt") as file:
            matrix: torch.Tensor = file.get_tensor(name)
        was_conv1d = getattr(module, "source_cls", type(None)).__name__ == "Conv1D"  # GPT-2: [in, out]
        return matrix.t() if was_conv1d else matrix

    return read


def num_weights(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: two in each byte of a packed 4-bit weight."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)
