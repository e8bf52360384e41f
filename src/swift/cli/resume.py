"""``swift resume RUN [--option value ...]``: go on with an interrupted run, in its own folder.

``swift resume ID ...`` puts paused jobs back into the queue.
"""

from __future__ import annotations

from pathlib import Path

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
    name, flags = argv[0], argv[1:]
    if name.startswith("-"):
        raise UsageError("which run?", fix="swift resume RUN [--option value ...]")
    if not Path(name).expanduser().exists():
        from swift.cli.jobs import control, has_job

        if has_job(name):
            return control("resume", argv, "Put paused jobs back into the queue.")
        if "/" not in name:
            raise UsageError(
                f"{name}: there is no run folder and no job of this name",
                fix="name a run folder, such as output/NAME, or a job of swift ps",
            )
    from swift.cli.training import run_or_plan
    from swift.config.bind import load_run_config, resolve
    from swift.runs.folder import locate

    folder, checkpoint = locate(name)
    config = folder.path / "config.yaml"
    command = load_run_config(config).command
    start = str(checkpoint or folder.path)
    resolved = resolve(command, [str(config), *flags, "--resume_from_checkpoint", start])
    return run_or_plan(resolved, ["resume", *argv])
