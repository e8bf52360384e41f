"""``swift resume RUN [--option value ...]``: go on with an interrupted run, in its own folder.

``swift resume ID ...`` puts paused jobs back into the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swift.config.schema import Resolved
from swift.core.errors import UsageError

USAGE = """usage: swift resume RUN [--option value ...]
       swift resume ID|NAME ...

Go on with the run in folder RUN (or from one of its checkpoints, RUN/checkpoint-N) exactly where it stopped.
Options are those of the run's config.yaml; an option given here wins (for example a larger --max_steps).

With the id, name or group of paused jobs (swift ps), put them back into the queue."""


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    name = argv[0]
    if name.startswith("-"):
        raise UsageError("which run?", fix="swift resume RUN [--option value ...]")
    if not Path(name).expanduser().exists():
        from swift.cli.jobs import control, has_job

        if has_job(name):
            return control("resume", "Put paused jobs back into the queue.", argv, grace=False)
        if "/" not in name:
            raise UsageError(
                f"{name}: there is no run folder and no job of this name",
                fix="name a run folder, such as output/NAME, or a job of swift ps",
            )
    from swift.cli.training import run_or_plan

    return run_or_plan(resumed(argv), ["resume", *argv])


def resumed(words: Sequence[str]) -> Resolved:
    """The run in folder ``words[0]`` with the options behind it, to go on."""
    from swift.config.bind import load_run_config, resolve
    from swift.runs.folder import locate

    folder, checkpoint = locate(words[0])
    config = folder.path / "config.yaml"
    start = str(checkpoint or folder.path)
    command = load_run_config(config).command
    return resolve(command, [str(config), *words[1:], "--resume_from_checkpoint", start])
