"""Rows that can be read but teach supervised fine-tuning nothing, or are made for another kind of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swift.data.formats import Sample

__all__ = ["TeachingReport"]

TASK_COLUMNS = ("label", "positive_messages", "negative_messages", "positive", "negative")
PREFERENCE_COLUMNS = ("chosen", "rejected", "rejected_response", "rejected_messages")
_SHOWN = 3


@dataclass
class TeachingReport:
    """Collects such rows while somebody reads data.

    Attributes:
        all_learned: every token is a target (pre-training, ``loss_scale all``): rows need no answer.
    """

    all_learned: bool = False
    unanswered: list[str] = field(default_factory=list)
    preferences: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    texts: dict[str, None] = field(default_factory=dict)
    """Columns of text beside a question without an answer: one of them may be the answer."""

    def look_at_sample(self, sample: Sample) -> None:
        """A row that could be read."""
        if self.all_learned or any(message["role"] == "assistant" for message in sample.messages):
            return
        is_task = any(sample.extra.get(name) is not None for name in TASK_COLUMNS)
        (self.tasks if is_task else self.unanswered).append(sample.location)
        if not is_task and len(self.unanswered) <= _SHOWN:
            names = (name for name, value in sample.extra.items() if isinstance(value, str) and value)
            self.texts |= dict.fromkeys(names)

    def look_at_columns(self, columns: Mapping[str, Any], location: str) -> None:
        """Any row; its columns as they stand in the file."""
        if any(columns.get(name) is not None for name in PREFERENCE_COLUMNS):
            self.preferences.append(location)

    def sentences(self) -> list[str]:
        """What there is to say, one sentence each; none for data that sft can use."""
        said = []
        if self.unanswered:
            said.append(
                f"{_rows(self.unanswered)} no assistant message: sft learns nothing from them"
                f" ({_places(self.unanswered)})" + self._not_read()
            )
        if self.tasks:
            said.append(
                f"{_rows(self.tasks)} a label or documents and no assistant message, so this is data for"
                f" --task_type seq_cls, embedding or reranker ({_places(self.tasks)})"
            )
        if self.preferences:
            said.append(
                f"{_rows(self.preferences)} chosen or rejected answers, so this is preference data: for swift rlhf"
                f" ({_places(self.preferences)})"
            )
        return said

    def _not_read(self) -> str:
        """How to say which column holds the answers, where one of those that are not read may do so."""
        if not self.texts:
            return ""
        column = next(iter(self.texts)) if len(self.texts) == 1 else "COLUMN"
        columns = "{" + f'"{column}": "response"' + "}"
        return f"; not read: {', '.join(self.texts)}; --columns '{columns}' says where the answers are"


def _rows(locations: list[str]) -> str:
    return "1 row has" if len(locations) == 1 else f"{len(locations)} rows have"


def _places(locations: list[str]) -> str:
    return ", ".join(locations[:_SHOWN]) + (", ..." if len(locations) > _SHOWN else "")
