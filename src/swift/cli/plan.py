"""``swift plan COMMAND ...``: what a command will do and cost, without doing it."""

from __future__ import annotations

import json
import sys

from swift.cli.fit import command_meant
from swift.config.schema import Resolved
from swift.core.errors import UsageError
from swift.core.registry import closest

__all__ = ["run", "show_plan"]


def run(argv: list[str]) -> int:
    """``swift plan sft run.yaml --lora_rank 8 [--json]``. Exit 0 when the configuration is valid, else 2."""
    from swift.config.bind import command_of, resolve
    from swift.config.commands import COMMANDS, LATER_COMMANDS
    from swift.config.read import FILE_ENDINGS

    words = [word for word in argv if word not in ("--json", "--dry_run", "--dry-run")]
    if words and words[0].lower().endswith(FILE_ENDINGS):
        from pathlib import Path

        if Path(words[0]).is_file() and _is_experiments(words[0]):
            return _show_forecast(words, as_json="--json" in argv)
        command = command_of(Path(words[0]), words[0])
    elif words and not words[0].startswith("-"):
        command, words = words[0].replace("_", "-"), words[1:]
    else:
        raise UsageError("which command?", fix="swift plan sft run.yaml --lora_rank 8")
    command, words = command_meant(command, words)
    planned = [
        entry.name for entry in (*COMMANDS.values(), *LATER_COMMANDS.values()) if not entry.own_arguments
    ]
    if command not in planned:
        near = closest(command, planned)
        raise UsageError(
            f"there is no plan for {command!r}",
            why=f"plans exist for {', '.join(planned)}",
            fix=f"did you mean swift plan {near}?" if near else None,
        )
    return show_plan(resolve(command, words, planning=True), as_json="--json" in argv)


def show_plan(resolved: Resolved, *, as_json: bool) -> int:
    """Print the plan as one JSON object, or as a card under the options that are not at their default."""
    from swift.plan.plan import make_plan

    plan = make_plan(resolved).to_dict()
    if as_json:
        print(json.dumps(plan, ensure_ascii=False, indent=2))
        return 0
    from swift.runs.cards import print_plan_card

    _print_options(resolved, plan)
    print_plan_card(plan)
    return 0


def _print_options(resolved: Resolved, plan: dict[str, object]) -> None:
    from swift.config.commands import known_command

    command = known_command(resolved.command)
    assert command is not None
    config, sources = plan["config"], plan["sources"]
    assert isinstance(config, dict) and isinstance(sources, dict)
    shown = [
        (name, json.dumps(config[option.section][name], ensure_ascii=False), sources[name])
        for name, option in command.options().items()
        if sources[name] != "default" and name in config.get(option.section, {})
    ]
    name_width = max((len(name) for name, _, _ in shown), default=0)
    value_width = min(44, max((len(value) for _, value, _ in shown), default=0))
    for name, value, source in shown:
        print(f"{name:<{name_width}}  {value:<{value_width}}  {source}")
    if shown:
        print(flush=True)
    sys.stdout.flush()


def _is_experiments(name: str) -> bool:
    from pathlib import Path

    from swift.experiments.file import is_experiment_file

    return is_experiment_file(Path(name))


def _show_forecast(words: list[str], *, as_json: bool) -> int:
    """Order, place, time and memory of every job of a file. Exit 1 when one of them cannot run here."""
    from pathlib import Path

    from swift.experiments.file import read_experiments
    from swift.experiments.forecast import forecast_file, forecast_text
    from swift.experiments.home import Home
    from swift.experiments.inventory import take_inventory

    if len(words) > 1:
        raise UsageError(
            "one word too many", where=words[1], fix="options of experiments stand in their file"
        )
    file = read_experiments(words[0])
    result = forecast_file(file, Path.cwd(), take_inventory(), Home.find())
    print(json.dumps(result, ensure_ascii=False, indent=2, default=str) if as_json else forecast_text(result))
    return 1 if any(job["problems"] for job in result["jobs"]) else 0
