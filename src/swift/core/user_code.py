"""Python files of a user: rewards, metrics, callbacks, algorithms."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from swift.core.errors import ConfigError, SwiftError

__all__ = ["load_file"]


def load_file(file: str | Path, kind: str, *, where: str) -> ModuleType:
    """The file as a module; it may import what lies beside it.

    Args:
        kind: what is looked for in it; part of the module's name.
        where: the option that names the file, for messages.

    Raises ConfigError when there is no such file, or it fails to import.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError("no such file", where=f"{where} {file}")
    name = f"swift_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("not a Python file", where=f"{where} {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything while it is imported
        text = error.message if isinstance(error, SwiftError) else error
        raise ConfigError(
            "the file cannot be imported", where=str(path), why=f"{type(error).__name__}: {text}"
        ) from error
    return module
