"""``swift fuse A.yaml B.yaml``: several LoRA runs on one base model, in this process or as many as they name."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.config.bind import command_of, resolve
from swift.config.parallel_rules import processes_of_launcher
from swift.config.schema import Resolved
from swift.core.logging import quiet_libraries


def run(argv: list[str]) -> int:
    """Exit 0 when all runs succeeded, else the exit code of the first that did not."""
    parser = ArgumentParser(
        prog="swift fuse",
        description="Train several LoRA runs at once on one base model, which is loaded and computed once for all.",
    )
    parser.add_argument("files", nargs="*", help="configuration files, each with `command:`")
    parser.add_argument("--group", help="serve a group of the experiment service (its folder)")
    parser.add_argument(
        "--measure", help="measure whether runs are faster fused (a JSON file of configurations)"
    )
    parser.add_argument("--worker", type=int, help="with --measure: be one of the separate processes")
    options = parser.parse(argv)
    gc.disable()  # until the first step, as in a run alone
    quiet_libraries()
    if options.group:
        return _serve(Path(options.group))
    if options.measure:
        from swift.train.fused_speed import main

        return main(Path(options.measure), options.worker)
    if not options.files:
        parser.error("name the configuration files of the runs")
    return _train([[command_of(Path(file), file), file] for file in options.files])


def _serve(folder: Path) -> int:
    """Be the process of a group, or the first of those that its members ask for."""
    from swift.config.sections.parallel import ParallelSection
    from swift.experiments.fused_host import Host, num_processes
    from swift.parallel.launch import as_worker, launch

    count = num_processes(folder)
    if count > 1 and processes_of_launcher() is None:
        section = ParallelSection(nproc_per_node=count, max_restarts=0)
        return launch(["fuse", "--group", str(folder)], section)
    with as_worker():
        return Host(folder, read_words).run()


def _train(words: Sequence[Sequence[str]]) -> int:
    from swift.parallel.launch import as_worker, launch
    from swift.runs.cards import print_end_card
    from swift.train.fused import train_fused

    read = [read_words(one) for one in words]
    extra = [{"arguments": ["swift", *one], **more} for one, (_, more) in zip(words, read, strict=True)]
    parallel = read[0][0].config.parallel
    if parallel.num_processes > 1 and processes_of_launcher() is None:
        # Started again they would know of one run folder only.
        return launch(["fuse", *(one[1] for one in words)], parallel.model_copy(update={"max_restarts": 0}))
    with as_worker():
        members = train_fused([resolved for resolved, _ in read], options=extra)
    shown = members if int(os.environ.get("RANK", "0")) == 0 else []
    for member in shown:
        if member.result is not None:
            print_end_card(member.result.folder, member.result.summary)
        else:
            render = getattr(member.error, "render", lambda error=member.error: repr(error))
            print(f"error: {member.name}: {render()}", file=sys.stderr)
    return next((member.exit_code for member in members if member.exit_code), 0)


def read_words(words: Sequence[str]) -> tuple[Resolved, dict[str, Any]]:
    """What ``swift WORDS`` would train, and how it is evaluated."""
    command, rest = words[0], list(words[1:])
    if command == "resume":
        from swift.cli.resume import resumed

        resolved = resumed(rest)
    else:
        resolved = resolve(command, rest)
    more: dict[str, Any] = {}
    if resolved.config.evaluation.eval_tasks is not None:
        from swift.evaluate.training import suite_evaluators

        more["evaluators"] = suite_evaluators(resolved)
    return resolved, more
