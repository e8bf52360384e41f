"""Sequence classifiers: transformers' ``*ForSequenceClassification`` of a decoder, with one linear head ``score``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.core.errors import ModelError

__all__ = [
    "SCORE",
    "ClassifierHead",
    "classifier_of",
    "is_classifier",
    "is_classifier_name",
    "start_head",
]

SCORE = "score"
"""Name of the head in all of transformers' decoders: ``Linear(hidden_size, num_labels, bias=False)``."""
_SUFFIX = "ForSequenceClassification"


@dataclass(frozen=True)
class ClassifierHead:
    """What the head is like.

    Attributes:
        num_labels: its outputs.
        problem_type: what transformers computes a loss by; recorded in config.json.
        seed: start of its weights where the folder has none.
    """

    num_labels: int
    problem_type: str | None = None
    seed: int = 42


def is_classifier(model: Any) -> bool:
    """True for ``*ForSequenceClassification``."""
    return is_classifier_name(type(model).__name__)


def is_classifier_name(name: str) -> bool:
    """True for the names of such classes."""
    return name.endswith(_SUFFIX)


def classifier_of(model_class: Any, config: Any, head: ClassifierHead, folder: Path) -> Any:
    """The sequence classifier that belongs to a causal model; sets the head's size in ``config``.

    Raises ModelError when transformers has none with a head ``score``.
    """
    import transformers

    name = str(model_class.__name__)
    wanted = name if name.endswith(_SUFFIX) else name.removesuffix("ForCausalLM") + _SUFFIX
    found = getattr(transformers, wanted, None)
    if found is None:
        raise ModelError(
            f"transformers has no sequence classifier for {name}",
            where=str(folder),
            fix="--task_type generative_reranker or embedding, or another --model",
        )
    config.num_labels = head.num_labels
    config.problem_type = head.problem_type
    return found


def start_head(model: Any, missing: Collection[str], head: ClassifierHead) -> list[str]:
    """Start a head that the folder did not have, alike for every run of a seed; returns what else is missing.

    Raises ModelError for an architecture whose head is another one.
    """
    import torch

    score = getattr(model, SCORE, None)
    if not isinstance(score, torch.nn.Linear) or score.bias is not None:
        raise ModelError(f"the head of {type(model).__name__} is not one linear layer called {SCORE}")
    if f"{SCORE}.weight" in missing:
        spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
        generator = torch.Generator().manual_seed(head.seed)
        start = torch.randn(score.weight.shape, generator=generator) * spread
        with torch.no_grad():
            score.weight.copy_(start)
    return [name for name in missing if name != f"{SCORE}.weight"]
