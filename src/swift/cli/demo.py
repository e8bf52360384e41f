"""``swift demo``: train a tiny model here and now, and watch it learn."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS
from swift.core.errors import SwiftError
from swift.core.logging import quiet_libraries

if TYPE_CHECKING:
    from swift.demo.run import DemoResult


def run(argv: list[str]) -> int:
    """Exit code 0 when the model has mastered the task, 1 when it has not."""
    parser = ArgumentParser(prog="swift demo", description=COMMANDS["demo"].help)
    parser.add_argument(
        "--output_dir", default="demo", metavar="DIR", help="folder for everything (default: demo)"
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="other data, other weights (default: 42)"
    )
    parser.add_argument(
        "--single",
        action="store_true",
        help="only the first run, without what follows it",
    )
    arguments = parser.parse(argv)
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # read when torch loads; more threads slow so small a model down
    quiet_libraries()
    from swift.demo.run import GOAL, run_demo
    from swift.experiments.home import Home
    from swift.experiments.inline import end_left_jobs
    from swift.train.callbacks.progress import ProgressLine

    folder = Path(arguments.output_dir)
    if (folder / "service").is_dir() and (left := end_left_jobs(Home(folder / "service"))):
        print(f"an earlier demo was killed here: {left} of its experiments are cancelled", file=sys.stderr)
    result = run_demo(folder, seed=arguments.seed, callbacks=[ProgressLine()])
    _show(result)
    if result.accuracy_after < GOAL:
        print(f"the goal is {GOAL:.0%}: this seed did not get there", file=sys.stderr)
        return 1
    if arguments.single:
        return 0
    _learn_from_a_reward(folder, arguments.seed)
    return _experiments(folder, result.run / "last", arguments.seed)


def _learn_from_a_reward(folder: Path, seed: int) -> None:
    """Another model gets no answers to copy, only a number for each of its own (GRPO)."""
    from swift.demo.policy import run_policy_demo
    from swift.demo.show import sparkline
    from swift.runs.cards import print_card
    from swift.train.callbacks.progress import ProgressLine

    shutil.rmtree(folder / "grpo", ignore_errors=True)
    print(
        "\nreinforcement learning: a model that knows the task badly learns from the rewards of its own answers\n"
    )
    result = run_policy_demo(folder, seed=seed, callbacks=[ProgressLine()])
    curve = sparkline(result.rewards, encoding=sys.stdout.encoding or "ascii")
    run = _short(result.run)
    print_card(
        "what the reward taught",
        [
            ("reward", f"{result.rewards[0]:.2f} {curve} {result.rewards[-1]:.2f}"),
            ("held-out", f"reward {result.evaluated[-1]:.2f} at the end"),
            ("next", f"swift rollouts show {run} --step {len(result.rewards)} --worst 5"),
        ],
    )


def _experiments(folder: Path, model: Path, seed: int) -> int:
    """Four adapters at once, their evaluation and report, in a home of their own; then the winner's use.

    Inline, so that no service outlives a demo that is killed.
    """
    from swift.cli import compare, report
    from swift.cli import run as run_command
    from swift.demo.experiments import LEARNING_RATES, write_experiments
    from swift.demo.winner import ask_the_winner
    from swift.experiments.home import Home
    from swift.experiments.store import Store

    shutil.rmtree(folder / "experiments", ignore_errors=True)
    home = Home.find(folder / "service")
    os.environ["SWIFT_HOME"] = str(home.root)
    path = write_experiments(folder, model, seed=seed)
    print(
        f"\n{len(LEARNING_RATES)} experiments at once teach this model a second task with LoRA: "
        f"which learning rate learns it best?\n\n$ swift run {path} --inline"
    )
    if code := run_command.run([str(path), "--inline"]):
        return code
    group = Store(home.store).groups(limit=1)[-1].name
    judged = [group, "--metric", "exact_match"]
    print(f"\n$ SWIFT_HOME={home.root} swift compare")
    if code := compare.run(judged) or report.run([*judged, "--output", str(folder / "report.html")]):
        return code
    winner = compare.compare([group], "exact_match").winner
    if winner is None or winner.run_dir is None:
        raise SwiftError("no experiment has won", where=str(path), fix=f"swift compare {group}")
    return ask_the_winner(folder, Path(winner.run_dir) / "last", folder / "rotate-heldout.jsonl")


def _show(result: DemoResult) -> None:
    from swift.demo.show import answer_table, sparkline
    from swift.runs.cards import print_card

    num_shown = 6
    print()
    for line in answer_table(result.before[:num_shown], result.after[:num_shown]):
        print(f"   {line}")
    print()
    curve = sparkline(result.losses, encoding=sys.stdout.encoding or "ascii")
    run = _short(result.run)
    print_card(
        "what it learned",
        [
            (
                "held-out",
                f"{result.accuracy_before:.1%} right before, {result.accuracy_after:.1%} right after",
            ),
            ("loss", f"{result.losses[0]:.2f} {curve} {result.losses[-1]:.2f}"),
            ("curves", str(run / "curves.png")),
            ("run folder", str(run)),
            ("all answers", str(run / "answers.jsonl")),
            ("next", f"swift infer --model {run / 'last'}        (then type: Reverse SWIFT)"),
            ("", f"swift sft {run.parent / 'sft.yaml'} --learning_rate 1e-3"),
        ],
    )


def _short(path: Path) -> Path:
    """Relative to the working folder where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
