"""What became of the rows of a data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DataReport"]


@dataclass
class DataReport:
    """What became of every row. Locations are kept as ``Row.source`` -> numbers.

    Attributes:
        rows_read: rows read from the sources (after ``#N`` sampling).
        samples: samples kept; ``split`` makes several of one row.
        num_tokens: tokens kept.
        num_targets: tokens that are learned (a first token has nothing before it and never counts).
        deleted: rows left out because they are longer than max_length.
        truncated: rows cut or split at max_length.
        untargeted: rows left out because no token of them would be learned.
        bad_rows: (location, reason) of rows that could not be read (only with ``on_bad_rows=skip``).
    """

    rows_read: int = 0
    samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    deleted: dict[str, list[int]] = field(default_factory=dict)
    truncated: dict[str, list[int]] = field(default_factory=dict)
    untargeted: dict[str, list[int]] = field(default_factory=dict)
    bad_rows: list[tuple[str, str]] = field(default_factory=list)

    def merge(self, other: DataReport) -> None:
        """Add the counts and locations of ``other``."""
        self.rows_read += other.rows_read
        self.samples += other.samples
        self.num_tokens += other.num_tokens
        self.num_targets += other.num_targets
        for name in ("deleted", "truncated", "untargeted"):
            mine = getattr(self, name)
            for file, numbers in getattr(other, name).items():
                mine.setdefault(file, []).extend(numbers)
        self.bad_rows.extend(other.bad_rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        return cls(**{**values, "bad_rows": [(where, why) for where, why in values["bad_rows"]]})
