"""Logs: plain lines for people, JSON lines (one file per rank) for machines.

Every JSON line has ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, ``rank`` and, where known, ``run``
and ``step``; further fields come from ``logger.info(..., extra={"fields": {...}})``.

Several runs can share a process: the files of a run get the records of the context (`contextvars`) that it runs in, and
those of threads that belong to no run.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import os
import warnings
from pathlib import Path

__all__ = [
    "attach_run_logs",
    "detach_run_logs",
    "get_logger",
    "keep_logs_apart",
    "quiet_libraries",
    "set_log_step",
]

_ROOT = "swift"
_run: contextvars.ContextVar[Path | None] = contextvars.ContextVar("run", default=None)
_step: contextvars.ContextVar[int | None] = contextvars.ContextVar("step", default=None)


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules; pass ``__name__``."""
    return logging.getLogger(name)


def set_log_step(step: int) -> None:
    """Stamp the following log lines with an optimizer step."""
    _step.set(step)


class _JsonLines(logging.Formatter):
    def __init__(self, run: str, rank: int) -> None:
        super().__init__()
        self.run, self.rank = run, rank

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run": self.run,
            "rank": self.rank,
            **({} if (step := _step.get()) is None else {"step": step}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def keep_logs_apart() -> None:
    """This context is one of several runs in a process: until it has files of its own, its records go to none."""
    _run.set(Path())


class _RunFile(logging.FileHandler):
    """A log file of the run in the folder ``run``."""

    def __init__(self, run: Path, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.run = run
        self.addFilter(lambda record: _run.get() in (None, run))


def attach_run_logs(folder: Path, rank: int = 0) -> None:
    """Send our log records to ``log.txt`` (rank 0) and ``logs/rank-N.jsonl`` in a run folder."""
    detach_run_logs()
    logger = logging.getLogger(_ROOT)
    logger.setLevel(logging.INFO)
    (folder / "logs").mkdir(exist_ok=True)
    _run.set(folder)
    machine = _RunFile(folder, folder / "logs" / f"rank-{rank}.jsonl")
    machine.setFormatter(_JsonLines(folder.name, rank))
    logger.addHandler(machine)
    if rank == 0:
        human = _RunFile(folder, folder / "log.txt")
        human.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(human)


def detach_run_logs() -> None:
    """Close the files of ``attach_run_logs`` of this context."""
    logger, run = logging.getLogger(_ROOT), _run.get()
    _run.set(None)
    _step.set(None)
    for handler in list(logger.handlers):
        if isinstance(handler, _RunFile) and handler.run == run:
            logger.removeHandler(handler)
            handler.close()


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal: their warnings below ERROR and their progress bars.

    Call it before transformers is imported. A user's own setting of these variables wins.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "huggingface_hub", "torch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|transformers|huggingface_hub)\b.*"
    )
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|transformers|huggingface_hub)\b.*"
    )
