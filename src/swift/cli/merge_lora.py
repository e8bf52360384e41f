"""``swift merge-lora``: ``swift export --merge_lora true`` under its own name."""

from __future__ import annotations

from pathlib import Path

from swift.config.bind import resolve
from swift.config.schema import Resolved


def run(argv: list[str]) -> int:
    """Merge, check, print the report. Exit code 1 when the merged model computes something else."""
    from swift.cli.export import export_and_show

    return export_and_show(resolve("merge-lora", argv))


def merge(resolved: Resolved) -> Path:
    """The new folder. Raises as `swift.quantize.merge.merge`."""
    from swift.quantize.export import export

    return export(resolved)[0]
