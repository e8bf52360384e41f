"""The Python face of `swift`. Names are imported when they are first used, so ``import swift`` costs nothing."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "DPOTrainer": "swift.api",
    "GRPOTrainer": "swift.api",
    "SwiftModel": "swift.api",
    "SwiftTrainer": "swift.api",
    "infer": "swift.api",
    "run_experiments": "swift.api",
    "Callback": "swift.train.callbacks.base",
    "Config": "swift.config.schema",
    "SwiftError": "swift.core.errors",
}

__all__ = [
    "Callback",
    "Config",
    "DPOTrainer",
    "GRPOTrainer",
    "SwiftError",
    "SwiftModel",
    "SwiftTrainer",
    "__version__",
    "infer",
    "run_experiments",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # a package that can be called
        return importlib.import_module("swift.train")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'swift' has no attribute {name!r}")
