"""Which modules get an adapter, and which are trained in full beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from swift.core.errors import ConfigError, ModelError
from swift.core.logging import get_logger
from swift.core.registry import closest
from swift.models.classifier import SCORE, is_classifier
from swift.tuners.lora import LoraLinear, is_linear
from swift.tuners.lora_parameters import LoraParameters
from swift.tuners.saved_module import SavedModule

__all__ = [
    "decoder_layers",
    "find_saved",
    "find_targets",
    "linear_names",
    "module_names",
    "output_head_name",
    "short_names",
]

ALL_LINEAR = "all-linear"
logger = get_logger(__name__)


def module_names(model: nn.Module) -> list[str]:
    """Names of the modules as they are without our wrappers, the root left out."""
    wrappers: tuple[type[nn.Module], ...] = (LoraLinear, LoraParameters, SavedModule)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, wrappers))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers (with or without an adapter), in the model's order."""
    names = module_names(model)
    found = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LoraLinear) or is_linear(module):
            found.append(name)
    return found


def output_head_name(model: nn.Module) -> str | None:
    """Name of the module that turns hidden states into logits, or into the scores of a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None and is_classifier(model):
        head = getattr(model, SCORE)
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name of the list of decoder layers, and the list.

    Raises:
        ModelError: no list of the model has as many entries as its configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ModelError(f"no list of {count} decoder layers is found in a {type(model).__name__}")


def short_names(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """The last parts of the names (``q_proj``) when they mean exactly ``chosen``, else the full names.

    PEFT takes every module whose name is, or ends with a dot and, one of the targets.
    """
    leaves = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in module_names(model) if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(chosen) else list(chosen)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _leaves(names: Sequence[str]) -> list[str]:
    """Distinct last parts of module names, digits (list positions) left out."""
    return list(dict.fromkeys(leaf for name in names if not (leaf := name.rpartition(".")[2]).isdigit()))


def find_targets(
    model: nn.Module, target_modules: Sequence[str], target_regex: str | None, *, exclude: Sequence[str] = ()
) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    Args:
        model: the model, with or without adapters.
        target_modules: ``all-linear`` (every linear layer but the output head) or ends of module names:
            ``q_proj``, ``self_attn.q_proj``, or a full name.
        target_regex: must match a full name from its start to its end; replaces ``target_modules``.
        exclude: modules trained in full; they and what is inside them get no adapter.

    Raises:
        ConfigError: nothing matches, or what matches is not a linear layer.
    """
    inside = tuple(f"{name}." for name in exclude)
    linear = [name for name in linear_names(model) if not f"{name}.".startswith(inside)]
    if target_regex is not None:
        return _match_regex(target_regex, linear)
    head = output_head_name(model)
    chosen: set[str] = set()
    for target in target_modules:
        if target == ALL_LINEAR:
            chosen.update(name for name in linear if name != head)
            _warn_of_experts(model)
            continue
        matching = [name for name in linear if _ends_with(name, target)]
        if not matching:
            raise _no_target(model, target, target_modules, linear)
        chosen.update(matching)
    if not chosen:
        raise ConfigError("no linear layer is left for an adapter", where="--target_modules")
    return [name for name in linear if name in chosen]


def _warn_of_experts(model: nn.Module) -> None:
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if fused:
        logger.warning(
            "all-linear leaves out the experts: they are fused weights (%s and %d more), not linear layers",
            fused[0],
            len(fused) - 1,
        )


def _match_regex(pattern: str, linear: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            "not a regular expression", where="--target_regex", why=f"{pattern!r}: {error}"
        ) from None
    found = [name for name in linear if compiled.fullmatch(name)]
    if not found:
        raise ConfigError(
            "the expression matches no linear layer",
            where="--target_regex",
            why=f"{pattern!r} has to match a full name such as {linear[0]}" if linear else None,
            fix=f"--target_regex '.*\\.({'|'.join(_leaves(linear)[:3])})'" if linear else None,
        )
    return found


def _no_target(
    model: nn.Module, target: str, target_modules: Sequence[str], linear: Sequence[str]
) -> ConfigError:
    leaves = _leaves(linear)
    other = [name for name in module_names(model) if _ends_with(name, target)]
    if other:
        kind = type(model.get_submodule(other[0])).__name__
        return ConfigError(
            f"{target!r} is not a linear layer and cannot have an adapter",
            where="--target_modules",
            why=f"{other[0]} is a {kind}; linear layers here: {', '.join(leaves)}",
            fix=f"--modules_to_save {target} trains it in full",
        )
    right = [
        name if any(_ends_with(layer, name) for layer in linear) else closest(name, leaves)
        for name in target_modules
    ]
    repaired = " ".join(dict.fromkeys(name for name in right if name))
    return ConfigError(
        f"no linear layer is called {target!r}",
        where="--target_modules",
        why=f"linear layers here: {', '.join(leaves)}",
        fix=f"--target_modules {repaired or ALL_LINEAR}",
    )


def find_saved(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """Full names of the modules trained in full, in the model's order.

    Raises:
        ConfigError: no module has such a name, it has no weights, or shares them with another module (tied
            embeddings: the copy would drift away from its twin, and the merged model could not be stored).
    """
    names = module_names(model)
    chosen: set[str] = set()
    for end in modules_to_save:
        matching = [name for name in names if _ends_with(name, end)]
        if not matching:
            near = closest(end, _leaves(names))
            raise ConfigError(
                f"no module is called {end!r}",
                where="--modules_to_save",
                why=f"modules here: {', '.join(_leaves(names))}",
                fix=f"--modules_to_save {near}" if near else None,
            )
        chosen.update(matching)
    outermost = [name for name in names if name in chosen and not _has_parent(name, chosen)]
    for name in outermost:
        _check_saved(model, name)
    return outermost


def _has_parent(name: str, chosen: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:size]) in chosen for size in range(1, len(parts)))


def _check_saved(model: nn.Module, name: str) -> None:
    own = {id(parameter) for parameter in model.get_submodule(name).parameters()}
    if not own:
        raise ConfigError(f"{name} has no weights to train", where="--modules_to_save")
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{name}."):
            raise ConfigError(
                f"{name} shares its weights with {other.rpartition('.')[0]}",
                where="--modules_to_save",
                why="a trained copy of one of them would no longer equal the other, and the merged model "
                "could not be stored",
                fix="leave it out, or use --tuner_type full",
            )
