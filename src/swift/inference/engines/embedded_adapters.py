"""The adapters of a running engine: loaded and removed between steps, each for as long as requests use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from swift.core.errors import ConfigError, ModelError
from swift.tuners.apply import remove_adapter, tuned_model
from swift.tuners.lora_parameters import lora_parameters
from swift.tuners.peft_format import load_adapter, read_adapter_config

__all__ = ["Adapters"]


@dataclass
class _Adapter:
    """A loaded adapter: its name in the model, and how many requests use it."""

    folder: Path
    inner: str
    number: int
    num_requests: int = 0
    is_leaving: bool = False


class Adapters:
    """Names that requests know, and adapters of our LoRA layers.

    An adapter that the model came with has no name here: it acts where a request names none.

    Args:
        model: the transformers model, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tuned = tuned_model(model)
        self._has_other = tuned.other is not None or bool(lora_parameters(model))
        self.switch = tuned.switch
        self._own = tuned.switch.active if tuned.switch is not None else None
        self._loaded: dict[str, _Adapter] = {}
        self._next_number = 1

    def find(self, name: str | None) -> _Adapter | None:
        """One that is to stay; None for None. Raises ConfigError when it is not there."""
        if name is None:
            return None
        adapter = self._loaded.get(name)
        if adapter is None or adapter.is_leaving:
            known = ", ".join(sorted(self._loaded)) or "none is loaded"
            raise ConfigError(f"there is no adapter {name!r}", why=f"the adapters: {known}")
        return adapter

    def number(self, name: str | None) -> int:
        """A number for each adapter; 0 for the model as it came."""
        return 0 if name is None else self._loaded[name].number

    def inner(self, number: int) -> str | None:
        """The adapter's name in the model."""
        return next((one.inner for one in self._loaded.values() if one.number == number), self._own)

    def folders(self) -> dict[str, Path]:
        return {name: adapter.folder for name, adapter in self._loaded.items()}

    @contextlib.contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """One adapter acts on everything within the block. Raises ConfigError when it is not there."""
        adapter = self.find(name)
        if self.switch is None:
            yield
            return
        with self.switch.use(adapter.inner if adapter is not None else self._own):
            yield

    def load(self, name: str, folder: Path) -> None:
        """Put an adapter on the model. Raises SwiftError when the name is taken or the folder does not fit."""
        if name in self._loaded:
            raise ConfigError(
                f"there is an adapter {name!r} already", fix="unload it first, or take another name"
            )
        if self._has_other:
            raise ConfigError(
                "this model carries an adapter of another kind than LoRA, beside which there can be no other",
                fix="serve the base model",
            )
        config = read_adapter_config(folder)
        if config["peft_type"] != "LORA" or config.get("target_parameters"):
            raise ModelError("only LoRA on linear layers can be mixed in one engine", where=str(folder))
        number, self._next_number = self._next_number, self._next_number + 1
        inner = f"served{number}"  # a name may hold a dot, that of a module may not
        try:
            load_adapter(self.model, folder, inner)
        except ModelError:
            if inner in tuned_model(self.model).adapter_names:  # half of it fitted
                remove_adapter(self.model, inner)
            raise
        finally:
            self._update()
        self._loaded[name] = _Adapter(folder, inner, number)

    def leave(self, name: str) -> bool:
        """Take an adapter off once no request uses it. True when it went at once."""
        self._loaded[name].is_leaving = True
        return self._remove(name)

    def use(self, name: str | None) -> None:
        """A request begins."""
        if name is not None:
            self._loaded[name].num_requests += 1

    def release(self, name: str | None) -> bool:
        """A request has ended. True when its adapter went with it."""
        if name is None:
            return False
        self._loaded[name].num_requests -= 1
        return self._remove(name)

    def _remove(self, name: str) -> bool:
        adapter = self._loaded[name]
        if not adapter.is_leaving or adapter.num_requests:
            return False
        remove_adapter(self.model, adapter.inner)
        del self._loaded[name]
        self._update()
        return True

    def _update(self) -> None:
        self.model.eval()
        self.switch = tuned_model(self.model).switch
        if self.switch is not None:
            self.switch.active = self._own
