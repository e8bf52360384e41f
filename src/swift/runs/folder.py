"""The folder of one run: who may write it, its checkpoints, and which of them are best and last.

Writers hold a lock; readers (chat, plan, a dashboard) open the folder without one. What a killed writer left
behind is cleared by the next writer, never by a reader, because to a reader a half-written checkpoint of a
living run looks the same.
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from swift.core.errors import ConfigError, SwiftError
from swift.core.files import fsync_directory, remove_partial, replace_symlink
from swift.runs.lock import FolderLock

__all__ = ["RankFolder", "RunFolder", "find_latest_run", "locate", "step_of"]

COMPLETE_MARKER = "state.json"
"""A checkpoint folder without this file is not one."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")
_TEMPORARY = re.compile(r"\.(best|last|[\w.-]+\.(json|jsonl|yaml|png|txt))\.[^.]+")
_RUN_FILES = ("config.yaml", "status.json", "metrics.jsonl")


def step_of(checkpoint: Path) -> int:
    """The step of a folder called ``checkpoint-N``. Raises ValueError for other names."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"not a checkpoint folder: {checkpoint}")
    return int(match[1])


class RunFolder:
    """One run on disk. Use ``create`` or ``open``; as a context manager it gives the lock back at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

    @classmethod
    def create(cls, output_dir: str | Path, run_name: str | None = None) -> RunFolder:
        """A new run folder, locked for this process.

        ``<output_dir>/vN-YYYYMMDD-HHMMSS`` with N one above the largest there, or
        ``<output_dir>/<run_name>``. Any number of processes may call this at once: each gets a folder and a
        number of its own. Raises ConfigError when ``output_dir`` cannot be written or ``run_name`` holds a
        run already.
        """
        parent = Path(output_dir).expanduser().absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = cls(_allocate(parent) if run_name is None else _named(parent, run_name))
            folder.lock()
        except OSError as error:
            raise ConfigError(
                f"cannot create a run folder in {parent}",
                where="--output_dir",
                why=error.strerror,
                fix="name a folder you may write to: --output_dir PATH",
            ) from error
        if folder.holds_run():  # looked at under the lock: of two processes with one name, one gets it
            folder.release()
            raise ConfigError(
                f"{folder.path} already holds a run",
                where="--run_name",
                fix=f"go on with it: swift resume {shlex.quote(str(folder.path))}; or choose another --run_name",
            )
        return folder

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> RunFolder:
        """The run at ``path``: its folder, or a checkpoint inside (also ``best`` and ``last``).

        ``write=True`` takes the lock and clears what a killed writer left. Raises SwiftError when there is
        no run, or when another process writes it.
        """
        folder, _ = locate(path)
        if write:
            folder.lock()
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def lock(self) -> None:
        """Become the only writer, clear leftovers of a killed one. Raises SwiftError naming the holder."""
        if self._lock is None:
            self._lock = FolderLock(self.path)
            remove_partial(self.path)
            for entry in self.path.iterdir():
                if _TEMPORARY.fullmatch(entry.name) and (entry.is_file() or entry.is_symlink()):
                    entry.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def holds_run(self) -> bool:
        """True when a run has written here (configuration, status, metrics or a complete checkpoint)."""
        return any((self.path / name).exists() for name in _RUN_FILES) or bool(self.checkpoints())

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` belongs."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        if not self.path.is_dir():
            return []
        found = [
            entry
            for entry in self.path.iterdir()
            if _CHECKPOINT.fullmatch(entry.name) and (entry / COMPLETE_MARKER).is_file()
        ]
        return sorted(found, key=step_of)

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the largest step, or None."""
        return next(reversed(self.checkpoints()), None)

    def mark(self, kind: Literal["best", "last"], step: int) -> None:
        """Point ``best`` or ``last`` at the checkpoint of ``step``; ValueError when there is none."""
        target = self.checkpoint_path(step)
        if not (target / COMPLETE_MARKER).is_file():
            raise ValueError(f"no complete checkpoint to mark as {kind}: {target}")
        replace_symlink(self.path / kind, target.name)
        fsync_directory(self.path)

    def marked(self, kind: Literal["best", "last"]) -> Path | None:
        """The checkpoint the link ``best`` or ``last`` points at, or None."""
        link = self.path / kind
        if not link.is_symlink():
            return None
        target = self.path / link.readlink().name
        return target if (target / COMPLETE_MARKER).is_file() else None

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints of later steps to ``superseded-checkpoint-N``; returns them by their old names.

        A run that goes on from an earlier checkpoint writes these steps anew; the old ones must not be taken for
        its own. ``best`` and ``last`` no longer point at them.
        """
        later = [path for path in self.checkpoints() if step_of(path) > step]
        for link in ("best", "last"):
            if (self.path / link).is_symlink() and self.path / (self.path / link).readlink().name in later:
                (self.path / link).unlink()
        for path in later:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return later

    def prune(self, limit: int | None, keep: Iterable[int] = ()) -> list[int]:
        """Delete the oldest checkpoints until ``limit`` remain besides best, last and the steps in ``keep``.

        A folder is renamed aside before its files go, so that a kill in between leaves no half checkpoint
        under its own name. Returns the deleted steps; ``limit=None`` deletes nothing.
        """
        if limit is None:
            return []
        safe = {self.checkpoint_path(step) for step in keep}
        for link in (self.marked("best"), self.marked("last")):
            if link is not None:
                safe.add(link)
        spare = [path for path in self.checkpoints() if path not in safe]
        doomed = spare[: max(0, len(spare) - limit)]
        for path in doomed:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=self.path))
            path.rename(aside / path.name)
            shutil.rmtree(aside)
        return [step_of(path) for path in doomed]


class RankFolder(RunFolder):
    """Where another rank than the first keeps its own metrics and status: ``ranks/N`` in the run folder.

    The checkpoints are the run's; which of them are kept and marked is the first rank's affair.
    """

    def __init__(self, run: Path, rank: int) -> None:
        super().__init__(run / "ranks" / str(rank))
        self.run = RunFolder(run)
        self.path.mkdir(parents=True, exist_ok=True)

    def checkpoint_path(self, step: int) -> Path:
        return self.run.checkpoint_path(step)

    def checkpoints(self) -> list[Path]:
        return self.run.checkpoints()

    def marked(self, kind: Literal["best", "last"]) -> Path | None:
        return self.run.marked(kind)

    def mark(self, kind: Literal["best", "last"], step: int) -> None:
        """Nothing: the first rank does it."""

    def set_aside_after(self, step: int) -> list[Path]:
        return []

    def prune(self, limit: int | None, keep: Iterable[int] = ()) -> list[int]:
        return []


def locate(path: str | Path) -> tuple[RunFolder, Path | None]:
    """The run at ``path`` and, when ``path`` names one of its checkpoints (or a link to one), that
    checkpoint.

    Raises SwiftError when nothing is there or it is not a run.
    """
    given = Path(path).expanduser().absolute()
    if not given.is_dir():
        raise SwiftError("no such run folder", where=str(path), fix=_runs_near(given.parent))
    real = given.resolve()
    if _CHECKPOINT.fullmatch(real.name):
        if not (real / COMPLETE_MARKER).is_file():
            raise SwiftError(
                "this checkpoint is incomplete",
                where=str(path),
                why=f"it has no {COMPLETE_MARKER}",
                fix=f"take another one of {real.parent}",
            )
        return RunFolder(given.parent if given.parent.resolve() == real.parent else real.parent), real
    folder = RunFolder(given)
    if not folder.holds_run():
        raise SwiftError(
            "not a run folder",
            where=str(path),
            why=f"it has none of {', '.join(_RUN_FILES)}",
            fix=_runs_near(given),
        )
    return folder, None


def find_latest_run(output_dir: str | Path) -> RunFolder | None:
    """The run under ``output_dir`` that was written last (by its status, else its configuration), or None."""
    parent = Path(output_dir).expanduser().absolute()
    if not parent.is_dir():
        return None
    folders = [RunFolder(entry) for entry in parent.iterdir() if entry.is_dir() and not entry.is_symlink()]
    runs = [folder for folder in folders if not folder.path.name.startswith(".") and folder.holds_run()]
    return max(runs, key=lambda folder: (_last_written(folder.path), _version(folder.path)), default=None)


def _last_written(folder: Path) -> float:
    times = [(folder / name).stat().st_mtime for name in _RUN_FILES if (folder / name).exists()]
    return max(times, default=folder.stat().st_mtime)


def _version(path: Path) -> int:
    match = _VERSION.fullmatch(path.name)
    return int(match[1]) if match else 0


def _runs_near(folder: Path) -> str:
    latest = find_latest_run(folder)
    if latest is None and folder.is_dir() and (folder / "output").is_dir():
        latest = find_latest_run(folder / "output")
    return f"the newest run there is {latest.path}" if latest else "name a run folder, such as output/NAME"


def _allocate(parent: Path) -> Path:
    """Make the next ``vN-...`` folder.

    The time in the name keeps mkdir alone from deciding who gets N, so a number is claimed first, by mkdir
    of a hidden folder that exists only for a moment. Who has the claim looks once more, because an earlier
    claim on the same number may have come and gone since the folder was listed. A claim left by a kill costs
    one number.
    """
    number = 1 + max((_version(entry) for entry in parent.iterdir()), default=0)
    while True:
        claim = parent / f".v{number}.claim"
        try:
            claim.mkdir()
        except FileExistsError:
            number += 1
            continue
        try:
            if not any(_version(entry) == number for entry in parent.iterdir()):
                path = parent / f"v{number}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
                path.mkdir()
                return path
        finally:
            claim.rmdir()
        number += 1


def _named(parent: Path, run_name: str) -> Path:
    if not run_name or run_name.startswith(".") or os.sep in run_name or "\0" in run_name:
        raise ConfigError(
            f"{run_name!r} cannot be a run's name", where="--run_name", fix="use letters, digits, - and _"
        )
    path = parent / run_name
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise OSError(errno.ENOTDIR, f"{run_name} is a file") from None
    return path
