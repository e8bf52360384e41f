"""``swift rollouts show RUN``: what reinforcement learning sampled, and what it was worth."""

from __future__ import annotations

import json
import math
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS
from swift.core.errors import UsageError

__all__ = ["run"]

_SHOWN = 5
_TEXT = 400


def run(argv: list[str]) -> int:
    """Exit code 0; UsageError when there is no such step."""
    parser = ArgumentParser(prog="swift rollouts", description=COMMANDS["rollouts"].help)
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="answers of one step, or a line for each step")
    show.add_argument("run", metavar="RUN", help="run folder")
    show.add_argument(
        "--step", type=int, metavar="N", help="the step that learned from them; default: the last"
    )
    show.add_argument("--steps", action="store_true", help="a line for each batch of answers")
    chosen = show.add_mutually_exclusive_group()
    chosen.add_argument("--worst", type=int, metavar="N", help=f"the N of lowest reward (default {_SHOWN})")
    chosen.add_argument("--best", type=int, metavar="N", help="the N of highest reward")
    chosen.add_argument("--group", type=int, metavar="N", help="all answers to the Nth prompt, from 0")
    show.add_argument("--tokens", action="store_true", help="also every token with its log-probability")
    show.add_argument("--json", action="store_true", help="one JSON object a line")
    return _show(parser.parse(argv))


def _show(arguments: Any) -> int:
    from swift.rl.record import find_rollouts, read_rollouts, read_seconds
    from swift.runs.folder import locate

    folder = locate(arguments.run)[0].path
    files = find_rollouts(folder)
    if arguments.steps:
        for step, file in files.items():
            print(_summary(step, read_rollouts(file)))
        return 0
    wanted = max(files) if arguments.step is None else arguments.step
    earlier = [step for step in files if step <= wanted]
    if not earlier:
        raise UsageError(f"nothing was sampled up to step {wanted}", fix=f"--step {min(files)}")
    step = max(earlier)
    rows = read_rollouts(files[step])
    picked = _picked(rows, arguments)
    if arguments.json:
        for row in picked:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in read_seconds(files[step]).items())
    print(f"{_summary(step, rows)}\n{seconds}")
    for row in picked:
        _print(row, arguments.tokens)
    return 0


def _summary(step: int, rows: list[dict[str, Any]]) -> str:
    rewards = [row["reward"] for row in rows if not math.isnan(row["reward"])] or [math.nan]
    lengths = [len(row["tokens"]) for row in rows]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    return (
        f"step {step}: {len(rows)} answers, reward {sum(rewards) / len(rows):.4f} ({min(rewards):.4f} to "
        f"{max(rewards):.4f}), {sum(lengths) / len(rows):.1f} tokens, {cut} cut off"
    )


def _picked(rows: list[dict[str, Any]], arguments: Any) -> list[dict[str, Any]]:
    if arguments.group is not None:
        groups = list(dict.fromkeys((row["row"], row["row_number"], row["group"]) for row in rows))
        if not 0 <= arguments.group < len(groups):
            raise UsageError(
                f"there are {len(groups)} prompts", where="--group", fix=f"--group {len(groups) - 1}"
            )
        wanted = groups[arguments.group]
        return [row for row in rows if (row["row"], row["row_number"], row["group"]) == wanted]
    count = arguments.best if arguments.best is not None else arguments.worst or _SHOWN
    sign = 1 if arguments.best is None else -1
    ordered = sorted(rows, key=lambda row: (math.isnan(row["reward"]), sign * row["reward"]))
    return ordered[:count]


def _print(row: dict[str, Any], tokens: bool) -> None:
    parts = ", ".join(
        f"{name} {'-' if math.isnan(value) else f'{value:.4g}'}" for name, value in row["rewards"].items()
    )
    advantage = row["advantage"]
    learned = "" if not advantage else f", advantage {advantage[0]:+.3f}" if len(advantage) == 1 else ""
    left_out = "" if row["is_used"] else ", not learned from"
    print(f"\n{row['row']}{row['row_number']}  answer {row['sample'] + 1}, version {row['version']}")
    print(f"  reward {row['reward']:.4f} ({parts}){learned}{left_out}, {row['finish_reason']}")
    print(f"  prompt: {_short(row['prompt'])}\n  answer: {_short(row['completion'])}")
    if tokens:
        pairs = zip(row["tokens"], row["logprobs"], row["mask"], strict=True)
        print(
            "  tokens: "
            + " ".join(f"{token}:{value:.3f}{'' if kept else '*'}" for token, value, kept in pairs)
        )


def _short(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}... ({len(text)} characters)"
