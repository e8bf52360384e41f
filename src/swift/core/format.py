"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtKMGT])(i?)[bB]?|[bB])?")


def format_bytes(num_bytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_count(count: float) -> str:
    """``6815744`` -> ``6.8M``."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def format_duration(seconds: float) -> str:
    """``3725`` -> ``1h02m``; below a minute with one decimal."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def parse_size(text: str) -> int | None:
    """Bytes of ``8GiB``, ``500 MB`` (powers of 1000), ``8G`` (like GiB) or a plain number; None for other words."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, unit, binary = match.groups()
    if unit is None:
        return round(float(number))
    base = 1024 if binary or not text.strip().lower().endswith("b") else 1000
    return round(float(number) * base ** (1 + "kmgt".index(unit.lower())))


def aligned(rows: Sequence[Sequence[str]], numeric: Collection[int] = ()) -> list[str]:
    """A line for each row, with columns under one another, those in ``numeric`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in numeric else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
