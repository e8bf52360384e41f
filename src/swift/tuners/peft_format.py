"""PEFT's adapter folder, both ways and without importing PEFT.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; `swift.tuners.peft_names` knows what stands in
them. Other methods than LoRA are left to PEFT, and what neither can do is refused by name.

Known limit: for mixture-of-experts models that have ``gate_proj``, ``up_proj`` or ``down_proj`` as linear layers too
(DeepSeek's shared experts), PEFT 0.21 takes these names to mean the fused experts and cannot load the folder; we can.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.core.errors import ModelError
from swift.models.quantised import is_quantised_linear
from swift.runs.folder import RunFolder
from swift.tuners.adapter import adapter_of
from swift.tuners.apply import DEFAULT_ADAPTER, TunedModel, attach_adapter, tuned_model
from swift.tuners.blocks import BLOCK_TYPES, load_blocks
from swift.tuners.lora import AdapterSpec, LoraLinear, lora_layers
from swift.tuners.lora_parameters import LoraParameters, adapted_modules, from_peft, lora_parameters
from swift.tuners.peft_adapter import load_with_peft
from swift.tuners.peft_names import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    adapter_tensors,
    base_name,
    is_refused,
    needs_rounded_base,
    parameter_specs,
    plain_tensor,
    saved_tensors,
    specs_of,
    split_tensors,
    stored_spec,
    wrong_base,
)
from swift.tuners.registry import peft_method_of_folder
from swift.tuners.saved_module import saved_modules

__all__ = ["adapter_folder", "is_adapter_folder", "load_adapter", "read_adapter_config", "save_adapter"]


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
    model: nn.Module,
    folder: Path | None,
    base_path: str | Path | None = None,
    *,
    name: str = DEFAULT_ADAPTER,
    collect: Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]] = dict.items,  # type: ignore[assignment]
) -> None:
    """Write adapter ``name`` of ``model`` to ``folder`` (created where missing).

    ``collect`` gives names and tensors whose parts lie on several ranks; the others call this with ``folder`` None.

    The two files are written one after the other: wrap the call in ``atomic_directory`` where a crash
    matters.

    Raises:
        ModelError: the model has no such adapter.
    """
    from safetensors.torch import save_file

    other = adapter_of(model)
    if other is not None:
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        other.save(folder, base_name(base_path))
        return
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.specs}
    saved = {
        key: module.copies[name] for key, module in saved_modules(model).items() if name in module.copies
    }
    parameters = {key: one for key, one in lora_parameters(model).items() if name in one.specs}
    if not layers and not parameters:
        raise ModelError(f"the model has no adapter {name!r} to save", where=str(folder))
    tensors = adapter_tensors(layers, parameters, saved, name)
    named = collect({key: value.detach() for key, value in tensors.items()})
    plain = {key: plain_tensor(key, value) for key, value in named}
    if folder is None:
        return
    config = adapter_config(model, layers, parameters, list(saved), name, base_path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


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
        if is_refused(key, value):
            raise ModelError(
                f"this adapter needs {key}={json.dumps(value)}, which is not supported",
                where=str(path),
                fix="merge it into its base model with PEFT and use the merged model",
            )
    return dict(config)


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
    if needs_rounded_base(config) and not any(is_quantised_linear(one) for one in model.modules()):
        raise ModelError(
            "the adapter makes up for the rounding of a quantised base (LoftQ), and this base is not quantised",
            where=str(folder),
            fix=f"--quant_method bnb --quant_bits {config['loftq_config'].get('loftq_bits', 4)}",
        )
    tensors = _read_tensors(folder)
    pairs, rest = split_tensors(tensors, folder)
    saved = saved_tensors(model, rest, config, folder)
    parameters = parameter_specs(model, pairs, config, folder)
    specs = specs_of(model, pairs, config, folder)
    tuned = tuned_model(model)
    if name in tuned.adapter_names:
        _check_same(
            model, {**specs, **{key: one for key, (one, _) in parameters.items()}}, saved, name, folder
        )
    else:
        dtype = next(iter(tensors.values())).dtype
        tuned = attach_adapter(
            model,
            specs,
            list(saved),
            parameters={key: (spec, list(found)) for key, (spec, found) in parameters.items()},
            name=name,
            dtype=_training_dtype(dtype, trainable),
            saved_dtype=torch.float32 if trainable else None,
        )
    _copy_in(model, pairs, saved, name, folder)
    for module, (_, found) in parameters.items():
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraParameters)
        for key, pair in found.items():
            for own, stored in zip(layer.pair(name, key), from_peft(layer, key, pair, folder), strict=True):
                own.detach().copy_(stored)
    assert tuned.switch is not None
    tuned.switch.active = tuned.adapter = name
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
    for one in lora_parameters(model).values():
        for key in one.keys(name) if name in one.specs else ():
            found += one.pair(name, key)
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


def _check_same(
    model: nn.Module, specs: Mapping[str, AdapterSpec], saved: Mapping[str, Any], name: str, folder: Path
) -> None:
    layers = adapted_modules(model).items()
    present = {key: stored_spec(layer.specs[name]) for key, layer in layers if name in layer.specs}
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
                raise wrong_base(folder, f"{key}.{inner} has shape {list(value.shape)} in the adapter")
            current[inner].copy_(value)
        if missing := set(current) - set(values):
            raise ModelError(f"the adapter lacks {key}.{sorted(missing)[0]}", where=str(folder))
