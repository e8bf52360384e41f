"""How long samples may be, and how those of a micro-batch are laid out: padded, joined in one row, or packed.

One joined row is the default where the model can keep documents apart: nothing is padding, and the samples of a step
are drawn at random, which grouping by length does not allow. See docs/decisions/006-joined-rows.md.
"""

from __future__ import annotations

from swift.config.schema import Resolved
from swift.config.sections.data import DataSection
from swift.data.batching import Mode
from swift.models.facts import ModelFacts

__all__ = ["DEFAULT_MAX_LENGTH", "batch_mode", "derive_layout", "derive_max_length"]

DEFAULT_MAX_LENGTH = 2048
"""Tokens of a sample where nobody says otherwise: longer ones cost memory that most data does not need."""


def derive_max_length(resolved: Resolved, facts: ModelFacts) -> None:
    """What the model can read, 2,048 at most."""
    limit = facts.max_position_embeddings or DEFAULT_MAX_LENGTH
    resolved.derive("max_length", min(limit, DEFAULT_MAX_LENGTH), "the model's context length")


def derive_layout(resolved: Resolved, keeps_documents_apart: bool) -> None:
    """Decide ``padding_free`` where the user did not: who speaks of grouping by length wants padded rows."""
    if resolved.config.data.packing:
        resolved.derive("padding_free", False, "packing")
    elif resolved.is_explicit("group_by_length"):
        resolved.derive("padding_free", False, "group_by_length")
    else:
        resolved.derive("padding_free", keeps_documents_apart, "the model's attention")


def batch_mode(section: DataSection) -> Mode:
    """The layout that the options ask for."""
    return "packed" if section.packing else "padding_free" if section.padding_free else "padded"
