"""LISA (arXiv 2403.17919): full training of a few decoder layers at a time, besides embeddings, head and norms."""

from __future__ import annotations

import random
from typing import Any

from torch import nn
from torch.optim import Optimizer

from swift.train.callbacks.base import Callback, RunView
from swift.tuners.targets import decoder_layers

__all__ = ["LisaCallback"]


class LisaCallback(Callback):
    """Draws the layers that are trained. A draw follows from the seed and the step, so a resumed run repeats it.

    Args:
        model: all that it may train requires gradients already.
        optimizer: forgets the moments of layers that rest, which is what saves memory.
        activated: layers trained at a time.
        interval: steps between two draws.
        seed: of the draws.
    """

    def __init__(self, model: Any, optimizer: Optimizer, *, activated: int, interval: int, seed: int) -> None:
        _, layers = decoder_layers(model)
        self._layers: list[list[nn.Parameter]] = [
            [parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in layers
        ]
        self._optimizer = optimizer
        self._activated = min(activated, len(self._layers))
        self._interval, self._seed = interval, seed

    def on_train_begin(self, run: RunView) -> None:
        self.draw(run.state.step // self._interval)

    def on_step_end(self, run: RunView) -> None:
        if run.state.step % self._interval == 0:
            self.draw(run.state.step // self._interval)

    def draw(self, number: int) -> None:
        """Train the layers of draw ``number``, and let the others rest."""
        chosen = random.Random(f"{self._seed}:{number}").sample(range(len(self._layers)), self._activated)
        for index, parameters in enumerate(self._layers):
            for parameter in parameters:
                parameter.requires_grad_(index in chosen)
                if index not in chosen:
                    for part in getattr(self._optimizer, "parts", [self._optimizer]):
                        part.state.pop(parameter, None)
