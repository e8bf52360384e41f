"""What became of the rows of a data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

__all__ = ["DataReport", "StreamReport"]

_PLACES_KEPT = 6


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

    def count(self, name: str) -> int:
        """How many rows ``deleted``, ``truncated``, ``untargeted`` or ``bad_rows`` holds."""
        places = getattr(self, name)
        return len(places) if name == "bad_rows" else sum(map(len, places.values()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "bad_rows": [(where, why) for where, why in values.get("bad_rows", ())]})


@dataclass
class StreamReport(DataReport):
    """What became of the rows of a stream so far: all are counted, the places of the first few are kept.

    Attributes:
        windows: windows that were added.
        counts: ``deleted``, ``truncated``, ``untargeted``, ``bad_rows`` -> rows.
    """

    windows: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def merge(self, other: DataReport) -> None:
        """Add one window."""
        super().merge(other)
        self.windows += 1
        for name in ("deleted", "truncated", "untargeted"):
            self.counts[name] = self.count(name) + other.count(name)
            room, kept = _PLACES_KEPT, {}
            for file, numbers in getattr(self, name).items():
                if room > 0:
                    kept[file] = numbers[:room]
                room -= len(numbers)
            setattr(self, name, kept)
        self.counts["bad_rows"] = self.count("bad_rows") + other.count("bad_rows")
        del self.bad_rows[_PLACES_KEPT:]

    def count(self, name: str) -> int:
        return self.counts.get(name, 0)

    def summary(self) -> dict[str, int]:
        """The numbers alone."""
        names = ("deleted", "truncated", "untargeted", "bad_rows")
        numbers = {
            name: getattr(self, name) for name in ("rows_read", "samples", "num_tokens", "num_targets")
        }
        return numbers | {name: self.count(name) for name in names}
