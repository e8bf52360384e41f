"""``swift report [NAME]``: the comparison as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swift.cli.compare import compare, parser_of

if TYPE_CHECKING:
    from swift.experiments.compare import Comparison


def run(argv: list[str]) -> int:
    """Write the page and print its path."""
    parser = parser_of("report")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html beside the run folders when they share a folder, else here",
    )
    arguments = parser.parse(argv)
    comparison = compare(arguments.what, arguments.metric)
    path = write_report(comparison, arguments.output)
    print(path)
    return 0


def write_report(comparison: Comparison, path: Path | None = None) -> Path:
    """Write the HTML file; default place: beside the run folders. Raises SwiftError when it cannot be written."""
    from swift.core.errors import SwiftError
    from swift.core.files import atomic_write_text
    from swift.experiments.report import render_html

    if path is None:
        parents = {Path(row.run_dir).parent for row in comparison.rows if row.run_dir}
        parent = parents.pop() if len(parents) == 1 else Path()
        path = (parent if parent.is_dir() else Path()) / "report.html"
    try:
        atomic_write_text(path.expanduser(), render_html(comparison))
    except OSError as error:
        raise SwiftError(
            "the report cannot be written", where=str(path), why=error.strerror, fix="--output FILE.html"
        ) from error
    return path
