"""PEFT's adapter folder, both ways and without importing PEFT.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with the tensors
``base_model.model.MODULE.lora_A.weight [rank, in]``, ``...lora_B.weight [out, rank]`` and, for modules
trained in full, ``base_model.model.MODULE.weight``. Written as PEFT 0.21 writes it, but for keys of the
configuration that older PEFT versions do not know and that would hold their default. Other methods than LoRA
are left to PEFT, and what neither can do is refused by name.

Known limit: for mixture-of-experts models that have ``gate_proj``, ``up_proj`` or ``down_proj`` as linear layers too
(DeepSeek's shared experts), PEFT 0.21 takes these names to mean the fused experts and cannot load the folder; we can.
"""

from __future__ import annotations

import json
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
from swift.runs.folder import RunFolder
from swift.tuners.adapter import adapter_of
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel, attach_adapter, tuned_model
from swift.tuners.blocks import BLOCK_TYPES, load_blocks
from swift.tuners.lora import AdapterSpec, LoraLinear, is_linear, lora_layers
from swift.tuners.peft_adapter import load_with_peft
from swift.tuners.registry import peft_method_of_folder
from swift.tuners.saved_module import saved_modules
from swift.tuners.targets import linear_names, module_names, short_names

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_folder",
    "is_adapter_folder",
    "load_adapter",
    "read_adapter_config",
    "save_adapter",
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
        "loftq_config",
        "corda_config",
        "eva_config",
        "lora_ga_config",
    )
)
_READ = frozenset(
    (
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "use_rslora",
    )
)
# Initialisations that change the base weights as well ("pissa", "olora", ...) are not among these.
_BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter_folder(folder: Path) -> bool:
    """True when ``folder`` holds an adapter."""
    return (folder / CONFIG_FILE).is_file()


def adapter_folder(path: str | Path) -> Path:
    """The adapter that ``path`` stands for: an adapter folder, or a run folder (its last checkpoint).

    Raises:
        ModelError: nothing is there, or no adapter.
    """
    folder = Path(path).expanduser()
    if is_adapter_folder(folder):
        return folder
    if not folder.exists():
        raise ModelError(
            "no such folder", where=str(path), fix="name an adapter, a run or one of its checkpoints"
        )
    run = RunFolder(folder)
    checkpoint = run.marked("last") or run.latest_checkpoint()
    if (folder / "config.json").is_file():
        raise ModelError("this is a whole model, not an adapter", where=str(path), fix=f"--model {path}")
    if checkpoint is None:
        raise ModelError(f"no adapter here: neither {CONFIG_FILE} nor a checkpoint", where=str(path))
    if not is_adapter_folder(checkpoint):
        raise ModelError(
            "this run trained the whole model and has no adapter",
            where=str(path),
            fix=f"--model {checkpoint}",
        )
    return checkpoint


def save_adapter(
    model: nn.Module, folder: Path, base_path: str | Path | None = None, *, name: str = DEFAULT_ADAPTER
) -> None:
    """Write adapter ``name`` of ``model`` to ``folder`` (created where missing).

    The two files are written one after the other: wrap the call in ``atomic_directory`` where a crash
    matters.

    Raises:
        ModelError: the model has no such adapter.
    """
    from safetensors.torch import save_file

    other = adapter_of(model)
    if other is not None:
        folder.mkdir(parents=True, exist_ok=True)
        other.save(folder, _base_name(base_path))
        return
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.specs}
    saved = {
        key: module.copies[name] for key, module in saved_modules(model).items() if name in module.copies
    }
    if not layers:
        raise ModelError(f"the model has no adapter {name!r} to save", where=str(folder))
    tensors: dict[str, Tensor] = {}
    for key, layer in layers.items():
        lora_a, lora_b = layer.pair(name)
        tensors[f"{_PREFIX}{key}.lora_A.weight"] = lora_a
        tensors[f"{_PREFIX}{key}.lora_B.weight"] = lora_b
    for key, module in saved.items():
        tensors.update({f"{_PREFIX}{key}.{inner}": value for inner, value in module.state_dict().items()})
    config = _config(model, layers, list(saved), name, base_path)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _config(
    model: nn.Module,
    layers: Mapping[str, LoraLinear],
    saved: Sequence[str],
    name: str,
    base_path: str | Path | None,
) -> dict[str, Any]:
    specs = {key: _stored(layer.specs[name]) for key, layer in layers.items()}
    rank = Counter(spec.rank for spec in specs.values()).most_common(1)[0][0]
    alpha = Counter(spec.alpha for spec in specs.values()).most_common(1)[0][0]
    first = next(iter(specs.values()))
    return {
        "alpha_pattern": {re.escape(k): _plain(s.alpha) for k, s in specs.items() if s.alpha != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": _base_name(base_path),
        "bias": "none",
        "fan_in_fan_out": all(layer.is_transposed for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if first.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
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
        "task_type": "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _base_name(base_path: str | Path | None) -> str | None:
    """A folder is stored with its full path, so that the adapter finds it from anywhere."""
    if base_path is None:
        return None
    folder = Path(base_path).expanduser()
    return str(folder.resolve() if folder.is_dir() else base_path)


def _plain(number: float) -> float | int:
    """32.0 -> 32, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def _stored(spec: AdapterSpec) -> AdapterSpec:
    """With a kept start the stored adapter has twice the rank, and the same scale."""
    if not spec.keeps_start:
        return spec
    return replace(spec, rank=2 * spec.rank, alpha=spec.alpha * (math.sqrt(2) if spec.use_rslora else 2))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, checked for what our layer cannot do.

    Raises:
        ModelError: no or a broken configuration, another method than LoRA, or a LoRA variant we do not have.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no adapter here: {CONFIG_FILE} is missing", where=str(folder)) from None
    except ValueError as error:
        raise ModelError("broken adapter configuration", where=str(path), why=str(error)) from None
    kind = config.get("peft_type")
    if kind in BLOCK_TYPES.values() or peft_method_of_folder(config) is not None:
        return dict(config)
    if kind != "LORA":
        raise ModelError(f"adapters of type {kind} cannot be loaded", where=str(path))
    for key, value in config.items():
        if _is_refused(key, value):
            raise ModelError(
                f"this adapter needs {key}={json.dumps(value)}, which is not supported",
                where=str(path),
                fix="merge it into its base model with PEFT and use the merged model",
            )
    return dict(config)


def _is_refused(key: str, value: Any) -> bool:
    if key == "init_lora_weights":
        return value not in _BASE_KEEPING_INITS
    if key == "bias":
        return value != "none"
    return key not in _READ and key not in _IGNORED and bool(value)


def load_adapter(
    model: nn.Module, folder: Path, name: str = DEFAULT_ADAPTER, *, trainable: bool = False
) -> TunedModel:
    """Load an adapter folder (ours or PEFT's) onto ``model`` and let it act.

    When the model already has an adapter of that name, its values are replaced in place, so that an
    optimizer goes on holding the right parameters.

    Args:
        model: the base model, with or without adapters.
        folder: the adapter folder.
        name: the name it gets.
        trainable: train it on; False freezes it.

    Raises:
        ModelError: the folder is incomplete or needs what we do not have, or belongs to another base model.
    """
    config = read_adapter_config(folder)
    other = adapter_of(model)
    if other is not None:
        other.restore(folder)
        return TunedModel(model, "other", other=other)
    if config["peft_type"] in BLOCK_TYPES.values():
        return TunedModel(model, "other", other=load_blocks(model, folder, config, trainable=trainable))
    if peft_method_of_folder(config) is not None:
        _read_tensors(folder)
        return TunedModel(model, "other", other=load_with_peft(model, folder, config, trainable=trainable))
    tensors = _read_tensors(folder)
    pairs, rest = _split(tensors, folder)
    saved = _saved_names(model, rest, config, folder)
    specs = _specs(model, pairs, config, folder)
    tuned = tuned_model(model)
    if name in tuned.adapter_names:
        _check_same(model, specs, saved, name, folder)
    else:
        dtype = next(iter(pairs.values()))["A"].dtype
        tuned = attach_adapter(
            model,
            specs,
            list(saved),
            name=name,
            dtype=_training_dtype(dtype, trainable),
            saved_dtype=torch.float32 if trainable else None,
        )
    _copy_in(model, pairs, saved, name, folder)
    assert tuned.switch is not None
    tuned.switch.active = name
    for parameter in _parameters(model, name):
        parameter.requires_grad_(trainable)
    return tuned


def _training_dtype(stored: torch.dtype, trainable: bool) -> torch.dtype:
    """Half-precision adapters are trained in float32, as PEFT does; for use they stay as stored."""
    return torch.promote_types(stored, torch.float32) if trainable else stored


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for layer in lora_layers(model).values():
        if name in layer.specs:
            found += [layer.lora_A[name], layer.lora_B[name]]
    for module in saved_modules(model).values():
        if name in module.copies:
            found += list(module.copies[name].parameters())
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ModelError(f"the adapter has no {WEIGHTS_FILE}", where=str(folder))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError("broken adapter weights", where=str(path), why=str(error)) from None


def _split(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> {"A": ..., "B": ...}, other tensor name -> tensor), the prefix taken off."""
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


def _specs(
    model: nn.Module, pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, AdapterSpec]:
    linear = set(linear_names(model))
    specs: dict[str, AdapterSpec] = {}
    for module, pair in pairs.items():
        if module not in linear:
            raise _wrong_base(folder, f"the model has no linear layer {module}")
        layer = model.get_submodule(module)
        size_in, size_out = _features(layer)
        rank = pair["A"].shape[0]
        if tuple(pair["A"].shape) != (rank, size_in) or tuple(pair["B"].shape) != (size_out, rank):
            shapes = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
            raise _wrong_base(
                folder, f"{module} maps {size_in} to {size_out} features, the adapter has {shapes}"
            )
        specs[module] = AdapterSpec(
            rank=rank,
            alpha=float(_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))),
            dropout=float(config.get("lora_dropout") or 0.0),
            use_rslora=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "default",
        )
    return specs


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, LoraLinear):
        return layer.in_features, layer.out_features
    weight = layer.weight
    assert isinstance(weight, Tensor) and is_linear(layer)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _wrong_base(folder: Path, why: str) -> ModelError:
    return ModelError(
        "the adapter does not fit this base model",
        where=str(folder),
        why=why,
        fix=f"use the model named in {CONFIG_FILE} (base_model_name_or_path)",
    )


def _saved_names(
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
            raise _wrong_base(folder, f"the model has no module {owner or key}")
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


def _check_same(
    model: nn.Module, specs: Mapping[str, AdapterSpec], saved: Mapping[str, Any], name: str, folder: Path
) -> None:
    layers = lora_layers(model).items()
    present = {key: _stored(layer.specs[name]) for key, layer in layers if name in layer.specs}
    copies = {key for key, module in saved_modules(model).items() if name in module.copies}
    if _sizes(present) != _sizes(specs) or copies != set(saved):
        raise ModelError(
            f"adapter {name!r} was set up with other modules, ranks or scales than the stored one",
            where=str(folder),
            fix="keep the tuner options of the run that wrote it",
        )


def _sizes(specs: Mapping[str, AdapterSpec]) -> dict[str, tuple[int, float]]:
    return {key: (spec.rank, round(spec.scaling, 6)) for key, spec in specs.items()}


@torch.no_grad()
def _copy_in(
    model: nn.Module,
    pairs: Mapping[str, Mapping[str, Tensor]],
    saved: Mapping[str, Mapping[str, Tensor]],
    name: str,
    folder: Path,
) -> None:
    for key, pair in pairs.items():
        layer = model.get_submodule(key)
        assert isinstance(layer, LoraLinear)
        rank = layer.specs[name].rank
        if layer.specs[name].keeps_start:
            layer.set_start(name, pair["A"][rank:], -pair["B"][:, rank:])
        layer.lora_A[name].copy_(pair["A"][:rank])
        layer.lora_B[name].copy_(pair["B"][:, :rank])
    for key, values in saved.items():
        clone = saved_modules(model)[key].copies[name]
        current = clone.state_dict()
        for inner, value in values.items():
            if inner not in current or current[inner].shape != value.shape:
                raise _wrong_base(folder, f"{key}.{inner} has shape {list(value.shape)} in the adapter")
            current[inner].copy_(value)
        if missing := set(current) - set(values):
            raise ModelError(f"the adapter lacks {key}.{sorted(missing)[0]}", where=str(folder))
