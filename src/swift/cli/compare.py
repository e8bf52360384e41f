"""``swift compare [ID|NAME|FOLDER ...]``: experiments side by side, and which one won."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS

if TYPE_CHECKING:
    from swift.experiments.compare import Comparison
    from swift.experiments.report import Column

__all__ = ["compare", "parser_of", "run", "table_lines"]

_DISPENSABLE = (
    "rouge2", "rouge1", "best_eval_loss", "eval_perplexity", "best loss", "eval_token_accuracy", "device-hours",
    "memory (estimate)", "tokens", "evaluation.loss", "retries", "time", "rougeL", "exact_match", "last loss",
)  # fmt: skip
"""Columns that a narrow terminal goes without, the first one first, then suites'; never the one that decides."""
_WIDTH = 120
"""Where the output is no terminal."""
_SIDEWAYS = 6
"""At most so many experiments are columns."""


def run(argv: list[str]) -> int:
    """Exit code 0 when there was something to compare."""
    parser = parser_of("compare")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object (docs/en/comparison.md)")
    form.add_argument("--csv", action="store_true", help="one line per experiment")
    form.add_argument("--wide", action="store_true", help="all columns, whatever the width of the terminal")
    arguments = parser.parse(argv)
    comparison = compare(arguments.what, arguments.metric)
    if arguments.json:
        print(json.dumps(comparison.to_dict(), ensure_ascii=False, indent=2))
    elif arguments.csv:
        print(comparison.to_csv(), end="")
    else:
        _show(comparison, wide=arguments.wide)
    return 0


def parser_of(command: str) -> ArgumentParser:
    """With the options that compare and report share."""
    parser = ArgumentParser(prog=f"swift {command}", description=COMMANDS[command].help)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="ID|NAME|FOLDER",
        help="a submission, jobs, or run folders (also a folder of them); default: the newest submission",
    )
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
    from swift.experiments.lookup import select_experiments

    chosen = select_experiments(words)
    return collect(chosen.jobs, name=chosen.name, metric=metric, declared=chosen.declared, home=chosen.home)


def _show(comparison: Comparison, *, wide: bool) -> None:
    from swift.experiments.report import table_of
    from swift.runs.cards import print_card

    width = None if wide else shutil.get_terminal_size((_WIDTH, 24)).columns
    lines = table_lines(table_of(comparison), width, comparison.metric)
    for line in lines:
        print(line)
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


def table_lines(columns: Sequence[Column], width: int | None, metric: str) -> list[str]:
    """The table in at most ``width`` characters (None: everything): what is the same for all goes into one line below,
    few experiments stand side by side where there is no room for them one below the other, and what still does not
    fit is left out, the dispensable first, and named."""
    from swift.experiments.report import split_common
    from swift.experiments.show import table_text

    shown, common = (list(columns), []) if width is None else split_common(columns, metric)

    def upright() -> str:
        rows = list(zip(*(column.cells for column in shown), strict=True))
        numeric = {place for place, column in enumerate(shown) if not column.is_text}
        return table_text([column.title for column in shown], rows, numeric=numeric)

    def sideways() -> str:
        header, *rows = ([column.title, *column.cells] for column in shown)
        return table_text(header, rows)

    def fits(text: str) -> bool:
        return width is None or max(map(len, text.splitlines())) <= width

    text, hidden = upright(), []
    if not fits(text) and len(columns[0].cells) <= _SIDEWAYS and fits(sideways()):
        text = sideways()
    suites = [column.title for column in reversed(shown) if "." in column.title]
    for title in (*_DISPENSABLE, *suites):
        if fits(text):
            break
        if title != metric and any(column.title == title for column in shown):
            shown = [column for column in shown if column.title != title]
            hidden.append(title)
            text = upright()
    lines = text.splitlines()
    if common:
        lines += ["", "same for all: " + ", ".join(f"{column.title} {column.cells[0]}" for column in common)]
    if hidden:
        lines.append(f"no room for {', '.join(hidden)}: --wide, --csv or swift report")
    return lines
