"""One row of a source, and the name of the place it stands at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Row", "location_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: column -> value; empty when ``error`` is set.
        source: what a number is put behind to give a location: ``data.jsonl:``, ``data.parquet:row ``.
        number: 1-based line (parquet: row; a JSON list with several elements on a line: element); 0: the
        whole file.
        error: why the row cannot be read.
    """

    values: dict[str, Any]
    source: str
    number: int
    error: str | None = None

    @property
    def location(self) -> str:
        """``data.jsonl:57``, ``data.parquet:row 3``."""
        return location_of(self.source, self.number)


def location_of(source: str, number: int) -> str:
    """The text of a location; number 0 stands for the whole file."""
    return f"{source}{number}" if number else source.rpartition(":")[0]
