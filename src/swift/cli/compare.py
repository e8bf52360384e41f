"""``swift compare [ID|NAME|FOLDER ...]``: experiments side by side, and which one won."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Literal

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS

if TYPE_CHECKING:
    from swift.experiments.compare import Comparison
    from swift.experiments.report import Column

__all__ = ["compare", "parser_of", "run"]

_DISPENSABLE = (
    "rouge2", "rouge1", "best_eval_loss", "eval_perplexity", "best loss", "eval_token_accuracy", "device-hours",
    "memory (estimate)", "tokens", "evaluation.loss", "retries", "time", "rougeL", "exact_match", "last loss",
)  # fmt: skip
"""Columns that a narrow terminal goes without, the first one first; never the one that decides."""


def run(argv: list[str]) -> int:
    """Exit code 0 when there was something to compare."""
    parser = parser_of("compare")
    parser.add_argument(
        "what",
        nargs="*",
        metavar="ID|NAME|FOLDER",
        help="a submission, jobs, or run folders (also a folder of them); default: the newest submission",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object (docs/en/comparison.md)")
    form.add_argument("--csv", action="store_true", help="one line per experiment")
    arguments = parser.parse(argv)
    comparison = compare(arguments.what, arguments.metric)
    if arguments.json:
        print(json.dumps(comparison.to_dict(), ensure_ascii=False, indent=2))
    elif arguments.csv:
        print(comparison.to_csv(), end="")
    else:
        _show(comparison)
    return 0


def parser_of(command: str) -> ArgumentParser:
    """With the options that compare and report share."""
    parser = ArgumentParser(prog=f"swift {command}", description=COMMANDS[command].help)
    parser.add_argument(
        "--metric",
        metavar="M",
        help="what decides: loss, best_loss, eval_loss, exact_match, rougeL, evaluation.loss, ...; "
        "default: that of the sweep, else metric_for_best_model, else eval_loss",
    )
    return parser


def compare(words: list[str], metric: str | None) -> Comparison:
    """Compare what the words name. Reads the store and run folders; needs no service."""
    from swift.experiments.compare import collect
    from swift.experiments.compared import select

    chosen = select(words)
    return collect(chosen.jobs, name=chosen.name, metric=metric, declared=chosen.declared, home=chosen.home)


def _show(comparison: Comparison) -> None:
    from swift.experiments.report import table_of
    from swift.runs.cards import print_card

    columns, rows = table_of(comparison)
    if sys.stdout.isatty():
        _print_rich(columns, rows, comparison)
    else:
        titles = [column.title for column in columns]
        widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
        for cells in (titles, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print()
    for note in comparison.notes:
        print(f"note: {note}")
    for row in comparison.rows:
        for failure in row.failures:
            print(f"{failure['job']} {failure['state']}: {failure['reason']}")
        for problem in row.problems:
            print(f"{row.experiment}: {problem}")
    print_card(*_winner(comparison))


def _winner(comparison: Comparison) -> tuple[str, list[tuple[str, str]]]:
    from swift.experiments.report import format_value

    direction = "smaller" if comparison.minimize else "larger"
    judged = ("judged by", f"{comparison.metric} ({direction} is better; {comparison.why})")
    winner = comparison.winner
    if winner is None:
        return "no winner yet", [judged]
    lines = [judged, ("value", format_value(winner.value))]
    if winner.not_clearly_better_than:
        lines.append(("but", f"not clearly better than {', '.join(winner.not_clearly_better_than)}"))
    lines += [("next" if not place else "", text) for place, text in enumerate(winner.next_commands)]
    return f"{'winner' if winner.final else 'leads so far'}: {winner.experiment}", lines


def _print_rich(columns: list[Column], rows: list[list[str]], comparison: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shown, hidden = _fitting(columns, rows, console.width, comparison.metric)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place in shown:
        justify: Literal["left", "right"] = "left" if columns[place].is_text else "right"
        table.add_column(columns[place].title, justify=justify, overflow="fold")
    for number, cells in enumerate(rows):
        style = "bold green" if number == 0 and comparison.winner else ""
        table.add_row(*(Text(cells[place], style=style) for place in shown))
    console.print(table)
    if hidden:
        print(f"no room for {', '.join(hidden)}: --csv, --json or swift report")


def _fitting(
    columns: list[Column], rows: list[list[str]], width: int, metric: str
) -> tuple[list[int], list[str]]:
    """Numbers of the columns that fit side by side, and titles of those left out, the dispensable first."""
    widths = [
        max(map(len, cells)) + 3 for cells in zip((column.title for column in columns), *rows, strict=True)
    ]
    titles = [column.title for column in columns]
    shown, hidden = list(range(len(columns))), []
    for title in _DISPENSABLE:
        if sum(widths[place] for place in shown) <= width:
            break
        if title in titles and title != metric:
            shown.remove(titles.index(title))
            hidden.append(title)
    return shown, hidden
