"""Merge an adapter into its base weights, store the result as a plain model folder, and check it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swift.core.errors import ModelError
from swift.core.files import atomic_directory
from swift.models.compare import LogitsDifference, Probe, compare, model_logits, store_logits, stored_logits
from swift.tuners.apply import DEFAULT_ADAPTER, tuned_model
from swift.tuners.lora import LoraLinear, lora_layers
from swift.tuners.lora_parameters import lora_parameters
from swift.tuners.saved_module import saved_modules

__all__ = ["merge_adapter", "merge_limit", "merge_to_folder", "probe_tokens", "unpack_base"]

# Largest mean difference accepted, in standard deviations of the logits. Merging rounds each weight once: relative
# 2^-24 in float32, 2^-11 in float16, 2^-8 in bfloat16, and the errors of L layers add up like sqrt(L). The limits
# leave a factor of about ten above what deep models show; a forgotten or doubled adapter, or another base, is
# above them by orders of magnitude.
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def merge_limit(dtype: torch.dtype) -> float:
    """Largest accepted ``mean / spread`` of the difference in this precision."""
    return _LIMITS.get(dtype, 1e-3)


def probe_tokens(vocab_size: int, *, rows: int = 2, width: int = 64, seed: int = 0) -> list[Probe]:
    """Texts of random token ids, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Probe.text(row) for row in torch.randint(0, vocab_size, (rows, width), generator=generator).tolist()
    ]


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str = DEFAULT_ADAPTER) -> None:
    """Add adapter ``name`` to the base weights, in place, and take every wrapper off.

    The sum is computed in float32 and rounded once to the precision of the weight. Other adapters are lost.

    Raises:
        ModelError: there is no such adapter, or it sits on a weight that another module shares (a tied output head).
    """
    tuned = tuned_model(model)
    if name not in tuned.adapter_names:
        raise ModelError(f"the model has no adapter {name!r} to merge")
    if tuned.other is not None:
        tuned.other.merge()
        return
    for key, layer in lora_layers(model).items():
        if name in layer.specs:
            _refuse_quantised(model, key, layer)
            _refuse_shared(model, key, layer)
    for key, layer in lora_layers(model).items():
        if name in layer.specs:
            delta = layer.delta(name)
            layer.weight.copy_(layer.weight.to(delta.dtype) + delta)
        model.set_submodule(key, layer.base)
    for key, weights in lora_parameters(model).items():
        weights.merge(name)
        model.set_submodule(key, weights.base)
    for key, module in saved_modules(model).items():
        if name in module.copies:
            current = module.base.state_dict()
            for inner, value in module.copies[name].state_dict().items():
                current[inner].copy_(value)
        model.set_submodule(key, module.base)


def _refuse_quantised(model: Any, key: str, layer: LoraLinear) -> None:
    if layer.is_quantised:
        raise ModelError(
            f"the adapter cannot be merged into {key}: its weights are quantised",
            where=str(getattr(model, "name_or_path", "")) or None,
            why="the sum would be rounded to the few values of the quantised format, and most of the update lost",
            fix="merge into the full-precision model: swift merge-lora --adapters RUN --model FULL_PRECISION_FOLDER",
        )


def _refuse_shared(model: nn.Module, key: str, layer: LoraLinear) -> None:
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is layer.weight and other != f"{key}.base.weight":
            raise ModelError(
                f"the adapter on {key} cannot be merged: its weight is also that of {other.rpartition('.')[0]}",
                fix="use the adapter unmerged, or train without an adapter on that module",
            )


def unpack_base(model: Any) -> None:
    """Replace the quantised layers of ``model`` by plain ones with the same values, below its adapters.

    An adapter that makes up for the rounding (LoftQ) is merged into these: the merged model computes what was trained.
    """
    model.dequantize(model.dtype)
    for layer in lora_layers(model).values():
        layer.is_quantised = False


def merge_to_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    name: str = DEFAULT_ADAPTER,
    probes: Sequence[Probe] = (),
    finish: Callable[[Path, LogitsDifference], None] = lambda aside, difference: None,
) -> LogitsDifference:
    """Merge, write a plain transformers folder, read it back, and compare its logits with the adapter's.

    What is checked is what was written. The folder appears only when the check is passed. The weights of ``model``
    are given up before the folder is read: there is one model in memory at a time.

    Args:
        model: a transformers model with the adapter; of no use afterwards.
        tokenizer: stored beside it.
        folder: the new folder.
        probes: texts for the comparison; default: random tokens.
        finish: called with the unfinished folder after the check, to add to it.

    Raises:
        ModelError: the adapter cannot be merged, or the logits differ by more than rounding explains.
    """
    model.eval()
    probes = probes or probe_tokens(model.config.get_text_config().vocab_size)
    device, dtype, limit = model.device, model.dtype, merge_limit(model.dtype)
    switch = tuned_model(model).switch
    with (
        atomic_directory(folder) as aside,
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as expected,
    ):
        with switch.use(name) if switch else contextlib.nullcontext():
            store_logits(model_logits(model, probes), Path(expected))
        merge_adapter(model, name)
        model.config.use_cache = True  # switched off for training; stored, it would slow down every user
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        model.to("meta")
        stored = type(model).from_pretrained(
            aside,
            dtype=dtype,
            local_files_only=True,
            attn_implementation=model.config._attn_implementation,
        )
        found = model_logits(stored.to(device).eval(), probes)
        difference = compare(stored_logits(Path(expected)), found, probes)
        if not difference.relative <= limit:  # nor when it is not a number
            raise ModelError(
                "the merged model does not compute what the adapter computes",
                where=str(folder),
                why=f"{difference}; the limit is {limit:.0e} of the spread",
                fix="merge in higher precision: --torch_dtype float32",
            )
        finish(aside, difference)
    return difference
