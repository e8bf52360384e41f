"""From what the user hands in (a file of experiments, a file for one command, a command line) to jobs to submit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift.core.errors import ConfigError, UsageError
from swift.experiments.isolation import from_shell
from swift.experiments.types import Inventory, JobSpec

__all__ = ["Submission", "check_machine", "from_file", "from_mapping", "from_words"]


@dataclass(frozen=True)
class Submission:
    """Jobs to queue together.

    Attributes:
        sweep: text, shown and cwd of a file whose trials depend on results.
        wait: jobs that this machine cannot run are queued all the same.
        environment: what jobs take from this shell.
    """

    name: str
    source: str
    specs: list[JobSpec] = field(default_factory=list)
    sweep: dict[str, str] | None = None
    wait: bool = False
    environment: dict[str, str] = field(default_factory=lambda: from_shell(os.environ), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As ``POST /submit`` takes it."""
        return {
            "name": self.name,
            "source": self.source,
            "specs": [asdict(spec) for spec in self.specs],
            "sweep": self.sweep,
            "environment": self.environment,
        }


def from_file(
    path: str, cwd: Path, *, wait: bool = False, cold: bool = False, new_only: bool = False
) -> Submission:
    """A file with ``experiments`` or ``sweep``, else a configuration file that names its command.

    ``new_only``: without the experiments that have a run already.
    """
    from swift.config.read import FILE_ENDINGS
    from swift.experiments.expand import single
    from swift.experiments.file import is_experiment_file, read_experiments

    file = Path(path)
    if not path.lower().endswith(FILE_ENDINGS):
        raise UsageError(
            f"{path!r} is no file of experiments",
            fix=f"a file that ends in .yaml; for one command: swift submit -- {path} ...",
        )
    if is_experiment_file(file):
        return _submission(read_experiments(file), cwd, wait, cold, new_only)
    if new_only:
        raise UsageError("is for a file of experiments", where="--new", fix="leave it out")
    from swift.config.bind import command_of

    spec = single([command_of(file, path), path], cwd, resources={"cold": True} if cold else None)
    return Submission(spec.name, file.read_text(encoding="utf-8-sig"), [spec], wait=wait)


def from_mapping(values: Mapping[str, Any], cwd: Path, *, wait: bool = False) -> Submission:
    """The content of a file of experiments as a Python dict."""
    from swift.experiments.file import parse_experiments

    return _submission(parse_experiments(values), cwd, wait, False)


def from_words(
    words: Sequence[str],
    cwd: Path,
    *,
    name: str | None = None,
    resources: Mapping[str, Any] | None = None,
    wait: bool = False,
) -> Submission:
    """The words after ``swift`` as one job."""
    from swift.experiments.expand import single

    spec = single(words, cwd, name=name, resources=resources)
    return Submission(spec.name, shlex.join(["swift", *words]), [spec], wait=wait)


def _submission(file: Any, cwd: Path, wait: bool, cold: bool, new_only: bool = False) -> Submission:
    from dataclasses import replace

    from swift.experiments.expand import expand

    specs = expand(file, cwd, new_only=new_only)
    if cold:
        specs = [replace(spec, cold=True) for spec in specs]
    sweep = None
    if file.sweep is not None and file.sweep.is_controlled:
        sweep = {"text": file.text, "shown": file.shown, "cwd": str(cwd)}
    return Submission(file.name, file.text, specs, sweep, wait or file.resources.wait)


def check_machine(submission: Submission, inventory: Inventory) -> list[str]:
    """Sentences about jobs that this machine can never run. Raises ConfigError for the first unless ``wait``."""
    from swift.experiments.forecast import impossible

    problems = []
    for spec in submission.specs:
        decision = impossible(spec, inventory)
        if decision is None:
            continue
        if not submission.wait:
            raise ConfigError(
                f"{spec.name}: {decision.reason}",
                fix=f"{decision.fix}; or queue it for a larger machine (--wait)",
            )
        problems.append(f"{spec.name}: {decision.reason}")
    return problems
