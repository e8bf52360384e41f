"""A user's callbacks: ``FILE.py`` (all subclasses of Callback in it) or ``FILE.py:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from swift.core.errors import ConfigError
from swift.core.user_code import load_file
from swift.train.callbacks.base import Callback

__all__ = ["load_callbacks"]


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """Instances of the named callbacks. Raises ConfigError when a file or class is missing or fails to import."""
    callbacks: list[Callback] = []
    for name in names:
        file, _, wanted = name.partition(":")
        classes = _callback_classes(Path(file))
        if wanted and wanted not in classes:
            raise ConfigError(
                f"{file} has no callback {wanted!r}",
                where="--callbacks",
                why=f"found: {', '.join(classes) or 'none'}",
            )
        if not classes:
            raise ConfigError(
                f"{file} defines no callback",
                where="--callbacks",
                fix="derive a class from swift.train.callbacks.base.Callback",
            )
        callbacks += [classes[wanted]()] if wanted else [cls() for cls in classes.values()]
    return callbacks


def _callback_classes(file: Path) -> dict[str, type[Callback]]:
    module = load_file(file, "callback", where="--callbacks")
    return {
        name: cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Callback) and cls is not Callback and cls.__module__ == module.__name__
    }
