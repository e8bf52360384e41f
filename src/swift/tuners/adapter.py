"""What an adapter of another kind than our LoRA layer can do: PEFT's methods, and modules behind decoder layers."""

from __future__ import annotations

import abc
import contextlib
from pathlib import Path

from torch import Tensor, nn

from swift.core.errors import ModelError

__all__ = ["OtherAdapter", "adapter_of"]

_ATTRIBUTE = "swift_adapter"


class OtherAdapter(abc.ABC):
    """An adapter attached to ``model`` in place; the model then computes with it.

    Args:
        model: the transformers model.
        method: its name, for messages.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self.model = model
        self.method = method
        setattr(model, _ATTRIBUTE, self)

    @abc.abstractmethod
    def save(self, folder: Path, base_path: str | None) -> None:
        """Write ``adapter_config.json`` and the tensors to ``folder``, which exists."""

    @abc.abstractmethod
    def restore(self, folder: Path) -> None:
        """Replace the values by those of ``folder``, in place: an optimizer goes on holding the parameters."""

    @abc.abstractmethod
    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """The base model within the block."""

    def merge(self) -> None:
        """Add the adapter to the weights of the base and take it off. Raises ModelError where that is impossible."""
        raise ModelError(
            f"{self.method} cannot be merged: it is no change of a weight, but a computation of its own",
            fix="use the adapter as it is: swift infer --adapters DIR",
        )

    def detach(self) -> None:
        """Forget the adapter (after merging)."""
        delattr(self.model, _ATTRIBUTE)

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss once a step."""
        return None

    def after_step(self) -> None:  # noqa: B027  (not abstract: most methods have nothing to do)
        """Called after every optimizer step, while the gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027  (not abstract: most have no state)
        """Take `state` back."""


def adapter_of(model: nn.Module) -> OtherAdapter | None:
    """The adapter of another kind that ``model`` carries."""
    found = getattr(model, _ATTRIBUTE, None)
    assert found is None or isinstance(found, OtherAdapter)
    return found
