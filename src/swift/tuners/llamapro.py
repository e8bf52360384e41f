"""LLaMA-Pro (arXiv 2401.02415): copies of decoder layers, started as the identity, are trained; the rest is frozen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.tuners.targets import decoder_layers

__all__ = ["add_layers", "grow_config", "new_positions"]

_OUTPUTS = frozenset(
    ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "wo", "w2", "fc2", "fc_out")
)
"""Names of the matrices that write into the residual stream."""


def new_positions(num_layers: int, num_new: int, num_groups: int | None) -> list[int]:
    """Numbers of the new layers in the grown model.

    The ``num_layers`` old ones are split into groups (default: one for each new layer), and behind each group stand
    its share of the new ones.
    """
    groups = num_groups or num_new
    each = num_new // groups
    return [
        num_layers * (group + 1) // groups + group * each + copy_number
        for group in range(groups)
        for copy_number in range(each)
    ]


def add_layers(model: Any, section: TunerSection, *, grown: bool = False) -> None:
    """Insert the new layers (unless the model is ``grown`` already) and train them alone.

    Raises:
        ConfigError: the model has fewer layers than there are groups.
        ModelError: the grown model does not compute what the old one did, so this architecture is not supported.
    """
    name, layers = decoder_layers(model)
    num_new, groups = section.llamapro_num_new_blocks, section.llamapro_num_groups
    num_old = len(layers) - (num_new if grown else 0)
    if (groups or num_new) > num_old:
        raise ConfigError(
            f"{num_old} layers cannot be split into {groups or num_new} groups",
            where="--llamapro_num_new_blocks",
            fix=f"--llamapro_num_new_blocks {num_old}",
        )
    positions = new_positions(num_old, num_new, groups)
    if not grown:
        _grow(model, name, list(layers), positions)
    model.requires_grad_(False)
    layers = model.get_submodule(name)
    for position in positions:
        layers[position].requires_grad_(True)


@torch.no_grad()
def _grow(model: Any, name: str, old: list[nn.Module], positions: list[int]) -> None:
    was_training = model.training
    model.eval()
    tokens = torch.arange(4, device=model.device)[None]
    before = model(input_ids=tokens, use_cache=False).logits
    grow_config(model.config.get_text_config(), len(old), positions)
    layers = list(old)
    for position in positions:
        layers.insert(position, _identity(layers[position - 1]))
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    model.set_submodule(name, nn.ModuleList(layers))
    after = model(input_ids=tokens, use_cache=False).logits
    model.train(was_training)
    if not torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max())):
        raise ModelError(
            "the new layers do not start as the identity in this architecture",
            where="--tuner_type llamapro",
            why=f"none of {', '.join(sorted(_OUTPUTS))} closes its layers",
            fix="use --tuner_type lora or full",
        )


def _identity(layer: nn.Module) -> nn.Module:
    """A copy that adds nothing to the residual stream."""
    clone = copy.deepcopy(layer)
    for name, parameter in clone.named_parameters():
        if _OUTPUTS & set(name.split(".")[-2:]):
            parameter.zero_()
    return clone


def grow_config(config: Any, num_old: int, positions: list[int]) -> None:
    """More layers, and in every list that has one entry for each layer the entry of the copied one."""
    for value in list(vars(config).values()):
        if isinstance(value, list) and len(value) == num_old:
            for position in positions:
                value.insert(position, value[position - 1])
    config.num_hidden_layers = num_old + len(positions)
