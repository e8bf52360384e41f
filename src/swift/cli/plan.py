"""``swift plan COMMAND ...``: what a command will do and cost, without doing it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from swift.cli.fit import command_meant
from swift.config.schema import Resolved
from swift.core.errors import UsageError
from swift.core.registry import suggest

if TYPE_CHECKING:
    from pathlib import Path

    from swift.models.facts import ModelFacts
    from swift.plan.analytic import Setup
    from swift.plan.setup import Widest

__all__ = ["run", "show_plan", "traced"]


def run(argv: list[str]) -> int:
    """``swift plan sft run.yaml --lora_rank 8 [--json]``. Exit 0 when the configuration is valid, else 2."""
    from swift.config.bind import command_of, resolve
    from swift.config.commands import COMMANDS, LATER_COMMANDS
    from swift.config.read import FILE_ENDINGS

    words, wishes, memory = _take_wishes(argv)
    if words and words[0].lower().endswith(FILE_ENDINGS):
        from pathlib import Path

        if Path(words[0]).is_file() and _is_experiments(words[0]):
            if wishes - {"json"} or memory is not None:
                raise UsageError(
                    "a file of experiments is planned by the formulas",
                    where=words[0],
                    fix="swift plan sft ... --exact plans one run",
                )
            return _show_forecast(words, as_json="json" in wishes)
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
        raise UsageError(
            f"there is no plan for {command!r}",
            why=f"plans exist for {', '.join(planned)}",
            fix=suggest(command, planned, before="swift plan "),
        )
    resolved = resolve(command, words, planning=True)
    return show_plan(
        resolved,
        as_json="json" in wishes,
        exact="exact" in wishes,
        solving="solve" in wishes,
        device_memory=memory,
    )


def _take_wishes(argv: list[str]) -> tuple[list[str], set[str], int | None]:
    """(words of the planned command, words that say how to plan, bytes of ``--device_memory``)."""
    from swift.core.format import parse_size

    words: list[str] = []
    wishes: set[str] = set()
    memory: int | None = None
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name in ("json", "exact", "solve", "dry_run") and not equals:
            wishes.add(name)
        elif name == "device_memory":
            text = value if equals else next(rest, "")
            memory = parse_size(text)
            if not memory:
                raise UsageError(
                    f"{text!r} is not a size", where="--device_memory", fix="--device_memory 24GiB"
                )
        else:
            words.append(word)
    return words, wishes - {"dry_run"}, memory


def show_plan(
    resolved: Resolved,
    *,
    as_json: bool,
    exact: bool = False,
    solving: bool = False,
    device_memory: int | None = None,
) -> int:
    """Print the plan as one JSON object, or as a card under the options that are not at their default.

    Args:
        exact: memory by traced steps of the real training path (imports torch).
        solving: also what would fit.
        device_memory: bytes of a device that is not here.
    """
    from swift.plan.plan import make_plan

    method = traced if exact else None
    plan = make_plan(
        resolved, device_memory=device_memory, exact=method, solving=solving, probe=exact
    ).to_dict()
    if as_json:
        print(json.dumps(plan, ensure_ascii=False, indent=2))
        return 0
    from swift.runs.cards import print_plan_card

    _print_options(resolved, plan)
    print_plan_card(plan)
    return 0


def traced(
    resolved: Resolved, facts: ModelFacts, folder: Path | None, widest: Widest, setup: Setup
) -> dict[str, int]:
    """Bytes by part at the peak, from traced steps of the real training path (and sampling).

    Raises ConfigError, ModelError for what cannot be traced.
    """
    from swift.plan.divided import divided
    from swift.rl.memory import sampling
    from swift.train.memory import BatchShape, trace_memory

    shape = BatchShape(widest.rows, widest.width, widest.targets, widest.sequences, widest.prompts)
    afterwards = sampling(setup.sampling, resolved) if setup.sampling is not None else None
    phases = trace_memory(
        resolved, facts, folder, shape, device=setup.device, dtype=setup.compute, afterwards=afterwards
    )
    return divided(phases, facts, setup)


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
