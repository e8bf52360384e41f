"""Logs: plain lines for people, JSON lines (one file per rank) for machines.

Every JSON line has ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, ``rank`` and, where known, ``run``
and ``step``; further fields come from ``logger.info(..., extra={"fields": {...}})``.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import warnings
from pathlib import Path

__all__ = ["attach_run_logs", "detach_run_logs", "get_logger", "quiet_libraries", "set_log_step"]

_ROOT = "swift"
_context: dict[str, int | str] = {}


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules; pass ``__name__``."""
    return logging.getLogger(name)


def set_log_step(step: int) -> None:
    """Stamp the following log lines with an optimizer step."""
    _context["step"] = step


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
            **_context,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def attach_run_logs(folder: Path, rank: int = 0) -> None:
    """Send our log records to ``log.txt`` (rank 0) and ``logs/rank-N.jsonl`` in a run folder."""
    detach_run_logs()
    logger = logging.getLogger(_ROOT)
    logger.setLevel(logging.INFO)
    (folder / "logs").mkdir(exist_ok=True)
    machine = logging.FileHandler(folder / "logs" / f"rank-{rank}.jsonl", encoding="utf-8")
    machine.setFormatter(_JsonLines(folder.name, rank))
    logger.addHandler(machine)
    if rank == 0:
        human = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        human.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(human)


def detach_run_logs() -> None:
    """Close the files of ``attach_run_logs``."""
    logger = logging.getLogger(_ROOT)
    _context.clear()
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
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
