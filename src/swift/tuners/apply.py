"""Make a loaded model trainable: attach adapters, or choose which of its own weights are trained."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.models.quantised import is_quantised_linear, num_weights
from swift.tuners.adapter import OtherAdapter, adapter_of
from swift.tuners.blocks import BLOCK_TYPES, attach_blocks
from swift.tuners.freeze import freeze
from swift.tuners.llamapro import add_layers
from swift.tuners.lora import AdapterSpec, LoraLinear, lora_layers
from swift.tuners.lora_parameters import LoraParameters, adapted_modules, find_parameters, lora_parameters
from swift.tuners.peft_adapter import attach_with_peft
from swift.tuners.registry import peft_method
from swift.tuners.saved_module import SavedModule, saved_modules
from swift.tuners.starts import keeps_start, needs_data, start_from_weights
from swift.tuners.switch import AdapterSwitch
from swift.tuners.targets import find_saved, find_targets, short_names

__all__ = ["TunedModel", "apply_tuner", "attach_adapter", "module_seed", "remove_adapter", "tuned_model"]

DEFAULT_ADAPTER = "default"


@dataclass
class TunedModel:
    """A model and what of it is trained.

    Attributes:
        model: the model itself, changed in place.
        kind: ``lora`` (our layer), ``other`` (another adapter) or ``full`` (weights of the model itself).
        switch: which adapter acts; None but for ``lora``.
        other: the adapter of kind ``other``.
        adapter: the one that this is the view of, where the model has several; None: of all of them.
    """

    model: nn.Module
    kind: Literal["lora", "other", "full"]
    switch: AdapterSwitch | None = None
    other: OtherAdapter | None = None
    adapter: str | None = None

    @property
    def adapter_names(self) -> list[str]:
        """The adapters in the order in which they were attached; empty for full training."""
        if self.other is not None:
            return [DEFAULT_ADAPTER]
        names: dict[str, None] = {}
        for layer in lora_layers(self.model).values():
            names.update(dict.fromkeys(layer.specs))
        for parameters in lora_parameters(self.model).values():
            names.update(dict.fromkeys(parameters.specs))
        for module in saved_modules(self.model).values():
            names.update(dict.fromkeys(module.copies))
        return list(names)

    def named_trainable(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Name -> trained parameter, of one adapter (default: the view's)."""
        adapter = adapter or self.adapter
        named = self.model.named_parameters()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        if adapter is None or self.kind != "lora":
            return trained
        return {name: parameter for name, parameter in trained.items() if _adapter_of(name) == adapter}

    def parameter_sets(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is optimized together: of a view, ``default`` holds what its own adapter trains."""
        if self.kind != "lora" or self.adapter is not None:
            return {DEFAULT_ADAPTER: self.named_trainable()}
        return {name: self.named_trainable(name) for name in self.adapter_names}

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.named_trainable().values())

    @property
    def num_total(self) -> int:
        """Parameters of the model, adapters included; tied ones count once."""
        return sum(num_weights(parameter) for parameter in self.model.parameters())

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The base model within the block: a reference without a second copy.

        Raises:
            ModelError: full training changed the base itself.
        """
        if self.switch is None and self.other is None:
            raise ModelError("full training leaves no base model to go back to")
        with self.other.disabled() if self.other else self.switch.use(None):  # type: ignore[union-attr]
            yield


def _adapter_of(parameter_name: str) -> str | None:
    """``...q_proj.lora_A.NAME`` and ``...lm_head.copies.NAME.weight`` -> NAME."""
    parts = parameter_name.split(".")
    for marker in ("lora_A", "lora_B", "copies"):
        if marker in parts:
            return parts[parts.index(marker) + 1]
    return None


def tuned_model(model: nn.Module) -> TunedModel:
    """The view on a model that may already carry adapters."""
    other = adapter_of(model)
    if other is not None:
        return TunedModel(model, "other", other=other)
    wrappers: list[Any] = [
        *lora_layers(model).values(),
        *lora_parameters(model).values(),
        *saved_modules(model).values(),
    ]
    if not wrappers:
        return TunedModel(model, "full")
    return TunedModel(model, "lora", wrappers[0].switch)


def module_seed(seed: int, module_name: str) -> int:
    """A seed for one module, so that its start depends neither on the other modules nor on their order."""
    digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def attach_adapter(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    saved: Sequence[str] = (),
    *,
    parameters: Mapping[str, tuple[AdapterSpec, Sequence[str]]] | None = None,
    name: str = DEFAULT_ADAPTER,
    dtype: torch.dtype = torch.float32,
    saved_dtype: torch.dtype | None = torch.float32,
    seed: int = 42,
) -> TunedModel:
    """Attach one adapter and let it act. The first one freezes the model; later ones leave the others alone.

    Args:
        model: changed in place.
        specs: module name -> how its adapter is built.
        saved: names of modules of which a trainable copy is made.
        parameters: module name -> how its adapter is built, and which of its own weights have one.
        name: the adapter's name.
        dtype: storage precision of A and B.
        saved_dtype: storage precision of the copies; None keeps the module's own.
        seed: start of the matrices A.
    """
    tuned = tuned_model(model)
    if tuned.switch is None:
        model.requires_grad_(False)
        tuned = TunedModel(model, "lora", AdapterSwitch())
    tuned.adapter = name
    assert tuned.switch is not None
    if name in tuned.adapter_names:
        raise ValueError(f"the model already has an adapter {name!r}")
    for module_name, spec in specs.items():
        module = model.get_submodule(module_name)
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module, tuned.switch, key=module_seed(0, module_name))
            model.set_submodule(module_name, module)
        module.add_adapter(name, spec, dtype=dtype, seed=module_seed(seed, module_name))
    for module_name, (spec, keys) in (parameters or {}).items():
        module = model.get_submodule(module_name)
        if not isinstance(module, LoraParameters):
            module = LoraParameters(module, tuned.switch)
            model.set_submodule(module_name, module)
        module.add_adapter(name, spec, keys, dtype=dtype, seed=module_seed(seed, module_name))
    for module_name in saved:
        module = model.get_submodule(module_name)
        if not isinstance(module, SavedModule):
            module = SavedModule(module, tuned.switch)
            model.set_submodule(module_name, module)
        module.add_copy(name, saved_dtype)
    tuned.switch.active = name
    return tuned


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take one LoRA adapter off the model; layers without any are the plain ones again.

    Raises:
        ModelError: the model has no such adapter.
    """
    layers = adapted_modules(model)
    modules = saved_modules(model)
    if not any(name in layer.specs for layer in layers.values()) and not any(
        name in module.copies for module in modules.values()
    ):
        raise ModelError(f"the model has no adapter {name!r} to remove")
    for key, layer in layers.items():
        layer.remove_adapter(name)
        if not layer.specs:
            model.set_submodule(key, layer.base)
        if layer.switch.active == name:
            layer.switch.active = None
    for key, module in modules.items():
        if name in module.copies:
            del module.copies[name]
        if not module.copies:
            model.set_submodule(key, module.base)


def apply_tuner(
    model: nn.Module,
    section: TunerSection,
    *,
    seed: int = 42,
    param_dtype: torch.dtype | None = torch.float32,
    adapter_name: str = DEFAULT_ADAPTER,
    total_steps: int | None = None,
    restored: bool = False,
) -> TunedModel:
    """Prepare ``model`` (in place) for training as the options say.

    Args:
        model: a loaded transformers model.
        section: the tuner options.
        seed: start of the adapters.
        param_dtype: storage precision of trained weights of the model itself (full training and
            ``modules_to_save``); None keeps the loaded one. LoRA matrices have their own option.
        adapter_name: the name under which a LoRA adapter is attached.
        total_steps: of the run, for AdaLoRA.
        restored: the values come from a checkpoint, so the start need not be computed; with LLaMA-Pro ``model`` is
            the checkpoint and has its new layers.

    Raises:
        ConfigError: an option names modules or parameters that do not exist, or nothing is left to train.
    """
    if section.trains_whole_model:
        _refuse_quantised(model, section)
        if section.tuner_type == "llamapro":
            add_layers(model, section, grown=restored)
        else:
            freeze(model, section)
        _store_trained(model.parameters(), param_dtype)
        return TunedModel(model, "full")
    if section.tuner_type in BLOCK_TYPES:
        return TunedModel(model, "other", other=attach_blocks(model, section, seed=seed))
    method = peft_method(section)
    if method is not None:
        named = find_targets(model, section.target_modules, section.target_regex)
        targets = short_names(model, named)
        other = attach_with_peft(model, method, section, targets, seed=seed, total_steps=total_steps)
        return TunedModel(model, "other", other=other)
    saved = find_saved(model, section.modules_to_save)
    targets = find_targets(model, section.target_modules, section.target_regex, exclude=saved)
    spec = AdapterSpec(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        dropout=section.lora_dropout,
        use_rslora=section.use_rslora,
        init=section.init_weights,
        keeps_start=keeps_start(section.init_weights),
    )
    tuned = attach_adapter(
        model,
        dict.fromkeys(targets, spec),
        saved,
        parameters={
            module: (spec, keys) for module, keys in find_parameters(model, section.target_parameters).items()
        },
        name=adapter_name,
        dtype=getattr(torch, section.lora_dtype),
        saved_dtype=param_dtype,
        seed=seed,
    )
    if spec.keeps_start and not needs_data(spec.init) and not restored:
        start_from_weights(model, adapter_name, spec.init, functools.partial(module_seed, seed))
    return tuned


def _refuse_quantised(model: nn.Module, section: TunerSection) -> None:
    if any(is_quantised_linear(module) for module in model.modules()):
        raise ConfigError(
            "a quantised base cannot be trained in full",
            where=f"--tuner_type {section.tuner_type}",
            why="the model folder holds quantised weights: steps too coarse for an update",
            fix="--tuner_type lora, or the full-precision model",
        )


def _store_trained(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    for parameter in parameters:
        if parameter.requires_grad and dtype is not None:
            parameter.data = parameter.data.to(dtype)
