"""``swift export``: merge and quantise, with a report of what that costs. ``swift merge-lora`` is its first half."""

from __future__ import annotations

from swift.config.bind import resolve
from swift.config.schema import Resolved

__all__ = ["export_and_show", "run"]


def run(argv: list[str]) -> int:
    """Export and print the report. Exit code 1 when the result is past one of its limits."""
    resolved = resolve("export", argv)
    if "dry_run" in resolved.switches:
        from swift.cli.plan import show_plan

        return show_plan(resolved, as_json="json" in resolved.switches)
    return export_and_show(resolved)


def export_and_show(resolved: Resolved) -> int:
    """As ``run``, from resolved options."""
    from swift.core.logging import quiet_libraries
    from swift.quantize.export import export

    quiet_libraries()
    folder, report = export(resolved, say=_say)
    report.show(folder)
    return 0 if report.passed else 1


def _say(text: str) -> None:
    print(text, flush=True)
