"""Starts of LoRA that look at the training data first: gradients (LoRA-GA) or inputs (EVA) of every adapted layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.data.collate import collate
from swift.objectives.sft import SftObjective
from swift.parallel.native import NativeEngine
from swift.tuners.apply import DEFAULT_ADAPTER, module_seed
from swift.tuners.lora import LoraLinear, lora_layers
from swift.tuners.starts import start_from_gradients, start_from_inputs

__all__ = ["start_from_data"]

MAX_INPUT_ROWS = 2048
"""Inputs of a layer that are kept for EVA."""


def start_from_data(
    engine: NativeEngine, dataset: Any, resolved: Resolved, pad_token_id: int, name: str = DEFAULT_ADAPTER
) -> None:
    """Let adapter ``name`` of ``engine.model`` start from the first samples of ``dataset`` that are short enough.

    Raises:
        SwiftError: no sample has at most ``lora_ga_max_length`` tokens.
    """
    tuner, seed = resolved.config.tuner, resolved.config.training.seed
    size, model = tuner.lora_ga_batch_size, engine.model
    lengths = dataset.lengths.tolist()
    rows = [row for row, length in enumerate(lengths) if length <= tuner.lora_ga_max_length]
    rows = rows[: size * tuner.lora_ga_iters]
    if not rows:
        raise SwiftError(
            f"no sample is short enough to start from: the shortest has {min(lengths)} tokens",
            where="--lora_ga_max_length",
            fix=f"--lora_ga_max_length {min(lengths)}",
        )
    objective = SftObjective()
    found: dict[str, Tensor] = {}
    if tuner.init_weights == "eva":
        with _watching(model, name, partial(_keep_inputs, found)):
            for row in rows:
                engine.evaluate(collate(dataset, [[row]], "padded", pad_token_id), objective)
        start_from_inputs(model, name, found)
        return
    batches = [
        collate(dataset, [[row] for row in rows[first : first + size]], "padded", pad_token_id)
        for first in range(0, len(rows), size)
    ]
    with _watching(model, name, partial(_add_gradients, found)):
        engine.forward_backward(batches, objective)
    for group in engine.parameter_sets.values():
        group.optimizer.zero_grad(set_to_none=True)
    start_from_gradients(model, name, found, tuner, partial(module_seed, seed))


@contextlib.contextmanager
def _watching(model: nn.Module, name: str, watch: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``watch(layer name, input, output)`` for every pass through a layer of adapter ``name`` within the block."""

    def hook(key: str, _layer: LoraLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
        watch(key, args[0], output)

    layers = lora_layers(model).items()
    handles = [
        layer.register_forward_hook(partial(hook, key)) for key, layer in layers if name in layer.specs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_inputs(found: dict[str, Tensor], name: str, inputs: Tensor, _output: Tensor) -> None:
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    kept = torch.cat([found[name], rows]) if name in found else rows
    found[name] = kept[:MAX_INPUT_ROWS]


def _add_gradients(found: dict[str, Tensor], name: str, inputs: Tensor, output: Tensor) -> None:
    """Gradient of the weight ``[out, in]``: that of the output times the input."""

    def add(gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        product = rows.t() @ inputs.detach().reshape(-1, inputs.shape[-1]).float()
        found[name] = found[name] + product if name in found else product

    if output.requires_grad:
        output.register_hook(add)
