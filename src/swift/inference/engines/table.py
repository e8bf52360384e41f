"""The engines by the name that ``--infer_backend`` gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from swift.config.schema import Resolved
from swift.inference.engines.base import InferenceEngine

if TYPE_CHECKING:
    from swift.inference.context import InferenceContext

__all__ = ["ENGINES", "make_engine"]

ENGINES = {
    "transformers": "swift.inference.engines.embedded:make",
    "vllm": "swift.inference.engines.vllm:make",
}
"""Name -> ``module:function``; the function takes (context, resolved) and returns an engine that is not started."""


def make_engine(context: InferenceContext, resolved: Resolved) -> InferenceEngine:
    """The engine that the options name, for a model; not started yet. Imports nothing of the other engines."""
    module, name = ENGINES[resolved.config.engine.infer_backend].split(":")
    make: Callable[[InferenceContext, Resolved], InferenceEngine] = getattr(
        importlib.import_module(module), name
    )
    return make(context, resolved)
