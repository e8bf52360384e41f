"""What PEFT calls the tensors of a LoRA adapter, and what its configuration says: between folders and our layers.

The tensors are ``base_model.model.MODULE.lora_A.weight [rank, in]``, ``...lora_B.weight [out, rank]`` and, for modules
trained in full, ``base_model.model.MODULE.weight``. Configurations are written as PEFT 0.21 writes them, but for keys
that older PEFT versions do not know and that would hold their default.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.core.errors import ModelError
from swift.models.classifier import is_classifier
from swift.models.quantised import is_quantised_linear, linear_sizes
from swift.tuners.lora import AdapterSpec, LoraLinear, is_linear
from swift.tuners.lora_parameters import LoraParameters, find_parameters, peft_key, short_parameters, to_peft
from swift.tuners.targets import linear_names, module_names, short_names

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_config",
    "adapter_tensors",
    "base_name",
    "is_refused",
    "needs_rounded_base",
    "parameter_specs",
    "plain_tensor",
    "saved_tensors",
    "specs_of",
    "split_tensors",
    "stored_spec",
    "wrong_base",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys that say nothing about the computation, or that the tensors themselves answer.
_IGNORED = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "corda_config",
        "eva_config",
        "lora_ga_config",
    )
)
_READ = frozenset(
    (
        "alpha_pattern",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_parameters",
        "use_rslora",
    )
)
# Initialisations that change the base weights as well ("pissa", "olora", ...) are not among these.
_BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_tensors(
    layers: Mapping[str, LoraLinear],
    parameters: Mapping[str, LoraParameters],
    saved: Mapping[str, nn.Module],
    name: str,
) -> dict[str, Tensor]:
    """PEFT's tensor name -> value, of adapter ``name`` on ``layers`` and of the modules trained in full.

    The pairs of ``parameters`` are as we have them; `plain_tensor` is to be called with what was put together.
    """
    tensors: dict[str, Tensor] = {}
    for key, layer in layers.items():
        lora_a, lora_b = layer.pair(name)
        tensors[f"{_PREFIX}{key}.lora_A.weight"] = lora_a
        tensors[f"{_PREFIX}{key}.lora_B.weight"] = lora_b
    for key, adapted in parameters.items():
        for weight in (keys := adapted.keys(name)):
            lora_a, lora_b = adapted.pair(name, weight)
            tensors[f"{_PREFIX}{peft_key(key, keys, weight)}.lora_A.weight"] = lora_a
            tensors[f"{_PREFIX}{peft_key(key, keys, weight)}.lora_B.weight"] = lora_b
    for key, module in saved.items():
        tensors.update({f"{_PREFIX}{key}.{inner}": value for inner, value in module.state_dict().items()})
    return tensors


def plain_tensor(key: str, tensor: Tensor) -> Tensor:
    """A whole tensor as PEFT stores it: those of experts as matrices."""
    match = re.search(r"\.lora_([AB])\.weight$", key)
    return (to_peft(match[1], tensor) if match and tensor.ndim == 3 else tensor).to("cpu").contiguous()


def adapter_config(
    model: nn.Module,
    layers: Mapping[str, LoraLinear],
    parameters: Mapping[str, LoraParameters],
    saved: Sequence[str],
    name: str,
    base_path: str | Path | None,
) -> dict[str, Any]:
    """``adapter_config.json`` of adapter ``name`` on ``layers``; ``saved`` are the modules trained in full."""
    present: dict[str, LoraLinear | LoraParameters] = {**layers, **parameters}
    specs = {key: stored_spec(layer.specs[name]) for key, layer in present.items()}
    rank = Counter(spec.rank for spec in specs.values()).most_common(1)[0][0]
    alpha = Counter(spec.alpha for spec in specs.values()).most_common(1)[0][0]
    first = next(iter(specs.values()))
    adapted = {key: module.keys(name) for key, module in parameters.items()}
    return {
        "alpha_pattern": {re.escape(k): _plain(s.alpha) for k, s in specs.items() if s.alpha != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_name(base_path),
        "bias": "none",
        "fan_in_fan_out": all(layer.is_transposed for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if first.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {"loftq_bits": _bits(layers), "loftq_iter": 1} if first.init == "loftq" else {},
        "lora_alpha": _plain(alpha),
        "lora_dropout": first.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(k): s.rank for k, s in specs.items() if s.rank != rank},
        "revision": None,
        "target_modules": short_names(model, list(layers)),
        **({"target_parameters": short_parameters(model, adapted)} if adapted else {}),
        "task_type": "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _bits(layers: Mapping[str, LoraLinear]) -> int:
    """Of the base that LoftQ started from: bitsandbytes stores one number in an int8, or two in a byte."""
    return 8 if any(layer.weight.dtype == torch.int8 for layer in layers.values()) else 4


def needs_rounded_base(config: Mapping[str, Any]) -> bool:
    """True when the adapter started from its base's rounding error (LoftQ), so that it fits no base but the rounded.

    PEFT would start such an adapter anew when it loads ``init_lora_weights: loftq``; it ignores ``loftq_config``.
    """
    return bool(config.get("loftq_config"))


def base_name(base_path: str | Path | None) -> str | None:
    """A folder is stored with its full path, so that the adapter finds it from anywhere."""
    if base_path is None:
        return None
    folder = Path(base_path).expanduser()
    return str(folder.resolve() if folder.is_dir() else base_path)


def _plain(number: float) -> float | int:
    """32.0 -> 32, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def stored_spec(spec: AdapterSpec) -> AdapterSpec:
    """With a kept start the stored adapter has twice the rank, and the same scale."""
    if not spec.keeps_start:
        return spec
    return replace(spec, rank=2 * spec.rank, alpha=spec.alpha * (math.sqrt(2) if spec.use_rslora else 2))


def is_refused(key: str, value: Any) -> bool:
    """True for an entry of ``adapter_config.json`` that asks for what our layer does not do."""
    if key == "init_lora_weights":
        return value not in _BASE_KEEPING_INITS
    if key == "bias":
        return value != "none"
    return key not in _READ and key not in _IGNORED and bool(value)


def split_tensors(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> {"A": ..., "B": ...}, other tensor name -> tensor), the prefix taken off.

    Raises:
        ModelError: there are no pairs of matrices, or tensors of a LoRA variant that we do not have.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = value
        elif ".lora_" in name:
            raise ModelError(
                f"tensor {key} belongs to a LoRA variant that is not supported", where=str(folder)
            )
        else:
            rest[name] = value
    if not pairs:
        raise ModelError("the adapter holds no LoRA matrices", where=str(folder))
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise ModelError(f"the adapter lacks one of the two matrices of {module}", where=str(folder))
    return pairs, rest


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot or from its start."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def specs_of(
    model: nn.Module, pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, AdapterSpec]:
    """Module -> how its adapter is built, from the shapes of its matrices and the configuration.

    Raises:
        ModelError: the model has no such linear layer, or one of other sizes.
    """
    linear = set(linear_names(model))
    specs: dict[str, AdapterSpec] = {}
    for module, pair in pairs.items():
        if module not in linear:
            raise wrong_base(folder, f"the model has no linear layer {module}")
        layer = model.get_submodule(module)
        size_in, size_out = _features(layer)
        rank = pair["A"].shape[0]
        if tuple(pair["A"].shape) != (rank, size_in) or tuple(pair["B"].shape) != (size_out, rank):
            shapes = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
            raise wrong_base(
                folder, f"{module} maps {size_in} to {size_out} features, the adapter has {shapes}"
            )
        specs[module] = _spec(module, rank, config)
    return specs


def _spec(module: str, rank: int, config: Mapping[str, Any]) -> AdapterSpec:
    return AdapterSpec(
        rank=rank,
        alpha=float(_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        init=_init(config),
    )


def parameter_specs(
    model: nn.Module, pairs: dict[str, dict[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, tuple[AdapterSpec, dict[str, dict[str, Tensor]]]]:
    """Module -> how the adapter of its own weights is built, and weight -> pair; they are taken out of ``pairs``.

    Raises:
        ModelError: the model has no such weights.
    """
    found: dict[str, tuple[AdapterSpec, dict[str, dict[str, Tensor]]]] = {}
    for module, keys in find_parameters(model, config.get("target_parameters") or ()).items():
        mine = {key: pairs.pop(peft_key(module, keys, key), None) for key in keys}
        ranks = set()
        for key, pair in mine.items():
            if pair is None:
                raise wrong_base(folder, f"the adapter has no matrices of {module}.{key}")
            weight = model.get_submodule(module)
            own = getattr(weight.base if isinstance(weight, LoraParameters) else weight, key)
            ranks.add(pair["A"].shape[0] // (own.shape[0] if own.ndim == 3 else 1))
        if len(ranks) > 1:
            raise wrong_base(folder, f"the weights of {module} have adapters of ranks {sorted(ranks)}")
        found[module] = (_spec(module, ranks.pop(), config), {k: p for k, p in mine.items() if p is not None})
    return found


def _init(config: Mapping[str, Any]) -> str:
    if needs_rounded_base(config):
        return "loftq"
    return "gaussian" if config.get("init_lora_weights") == "gaussian" else "default"


def _features(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; a quantised weight is packed, and its shape says neither."""
    if isinstance(layer, LoraLinear):
        return layer.in_features, layer.out_features
    if is_quantised_linear(layer):
        outputs, inputs = linear_sizes(layer)
        return inputs, outputs
    weight = layer.weight
    assert isinstance(weight, Tensor) and is_linear(layer)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def wrong_base(folder: Path, why: str) -> ModelError:
    """The error for an adapter of another model, to be raised."""
    return ModelError(
        "the adapter does not fit this base model",
        where=str(folder),
        why=why,
        fix=f"use the model named in {CONFIG_FILE} (base_model_name_or_path)",
    )


def saved_tensors(
    model: nn.Module, rest: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors, for what the adapter stores in full.

    PEFT takes every module whose name ends with an entry of ``modules_to_save``, and may add the embeddings.
    """
    ends = tuple(config.get("modules_to_save") or ())
    known = set(module_names(model))
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in rest.items():
        parts = key.split(".")
        parents = [".".join(parts[:size]) for size in range(1, len(parts))]
        owner = next(
            (parent for parent in parents if ends and parent.endswith(ends)), parents[-1] if parents else ""
        )
        if owner not in known:
            raise wrong_base(folder, f"the model has no module {owner or key}")
        found.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = value
    for owner in found:
        _refuse_tied(model, owner, folder)
    return found


def _refuse_tied(model: nn.Module, owner: str, folder: Path) -> None:
    own = {id(parameter) for parameter in model.get_submodule(owner).parameters()}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{owner}."):
            raise ModelError(
                f"the adapter replaces {owner}, which shares its weights with {other.rpartition('.')[0]}",
                where=str(folder),
                fix="merge it into its base model with PEFT and use the merged model",
            )
