"""Small modules behind decoder layers: ReFT's edit of the hidden state, and the bottleneck adapter.

Nothing is replaced: they hang on forward hooks. The folder looks like PEFT's, which has neither method.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.tuners.adapter import OtherAdapter
from swift.tuners.peft_names import CONFIG_FILE, WEIGHTS_FILE
from swift.tuners.targets import decoder_layers

__all__ = ["BLOCK_TYPES", "BlockAdapter", "attach_blocks", "load_blocks"]

BLOCK_TYPES = {"reft": "SWIFT_REFT", "adapter": "SWIFT_ADAPTER"}
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class LoReft(nn.Module):
    """LoReFT (arXiv 2404.03592): ``h + R^T (W h + b - R h)`` with orthonormal rows of ``R [rank, hidden]``.

    R is the Q of the trained matrix's QR decomposition. W starts as R, so that nothing is edited at first. Unlike in
    the paper, every position is edited, the prompt's and the answer's: nothing has to be known of their limits.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.subspace = nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.source = nn.Linear(size, rank)
        with torch.no_grad():
            self.source.weight.copy_(self._rows())
            self.source.bias.zero_()

    def _rows(self) -> Tensor:
        q: Tensor = torch.linalg.qr(self.subspace.t())[0]
        return q.t()

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self._rows()
        return hidden + (self.source(hidden) - F.linear(hidden, rows)) @ rows


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al. (arXiv 1902.00751): ``h + up(act(down(h)))``, up starting at zero."""

    def __init__(self, size: int, width: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)
        self.activation = _ACTIVATIONS[activation]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = hidden + self.up(self.activation(self.down(hidden)))
        return changed


class BlockAdapter(OtherAdapter):
    """Blocks of one kind behind some decoder layers; stored and computed in float32.

    Args:
        model: a transformers model; frozen here.
        config: ``peft_type``, ``layers`` (numbers) and the sizes: all that is needed to build it again.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        method = next(name for name, kind in BLOCK_TYPES.items() if kind == config["peft_type"])
        super().__init__(model, method)
        self.config = config
        self._active = True
        size = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
        _, layers = decoder_layers(model)
        model.requires_grad_(False)
        device = next(model.parameters()).device
        blocks = nn.ModuleDict()
        for number in config["layers"]:
            place = layers[number] if method == "reft" else _feed_forward(layers[number])
            block = (
                LoReft(size, config["rank"])
                if method == "reft"
                else Bottleneck(size, config["width"], config["activation"])
            )
            blocks[str(number)] = block.to(device)
            place.register_forward_hook(self._hook(block))
        model.add_module("swift_blocks", blocks)
        self.blocks = blocks

    def _hook(self, block: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not self._active:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            with torch.autocast(hidden.device.type, enabled=False):
                changed = block(hidden.float()).to(hidden.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def save(self, folder: Path, base_path: str | None) -> None:
        text = json.dumps({**self.config, "base_model_name_or_path": base_path}, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in self.blocks.state_dict().items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def restore(self, folder: Path) -> None:
        try:
            self.blocks.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except RuntimeError as error:
            raise ModelError(
                "the adapter does not fit this base model, or was set up with other options",
                where=str(folder),
                why=str(error).splitlines()[-1].strip(),
            ) from None

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before


def _feed_forward(layer: nn.Module) -> nn.Module:
    for name, child in layer.named_children():
        if name in _FEED_FORWARD:
            return child
    raise ConfigError(
        f"no feed-forward part is found in a {type(layer).__name__}",
        where="--tuner_type adapter",
        why=f"its parts: {', '.join(name for name, _ in layer.named_children())}",
        fix="--tuner_type reft",
    )


def attach_blocks(model: nn.Module, section: TunerSection, *, seed: int) -> BlockAdapter:
    """Freeze ``model`` and put the blocks of the options behind its decoder layers.

    Raises:
        ConfigError: a layer does not exist.
    """
    count = len(decoder_layers(model)[1])
    config: dict[str, Any] = {"peft_type": BLOCK_TYPES[section.tuner_type], "layers": list(range(count))}
    if section.tuner_type == "reft":
        config |= {"rank": section.reft_rank, "layers": _chosen(section.reft_layers, count)}
    else:
        config |= {"width": section.adapter_length, "activation": section.adapter_act}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockAdapter(model, config)


def _chosen(layers: Sequence[int], count: int) -> list[int]:
    wrong = [number for number in layers if not 0 <= number < count]
    if wrong:
        raise ConfigError(
            f"there is no layer {wrong[0]}", where="--reft_layers", fix=f"numbers from 0 to {count - 1}"
        )
    return sorted(set(layers)) or list(range(count))


def load_blocks(model: nn.Module, folder: Path, config: dict[str, Any], *, trainable: bool) -> BlockAdapter:
    """Load a folder that `BlockAdapter.save` wrote. Raises ModelError when it does not fit the model."""
    known = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    if max(known["layers"]) >= len(decoder_layers(model)[1]):
        raise ModelError("the adapter does not fit this base model: it has fewer layers", where=str(folder))
    adapter = BlockAdapter(model, known)
    adapter.restore(folder)
    adapter.blocks.requires_grad_(trainable)
    return adapter
