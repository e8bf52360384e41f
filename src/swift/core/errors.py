"""Errors that a user sees: what happened, where, why, and what to do about it."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "HubError",
    "ModelError",
    "NotOnHub",
    "SwiftError",
    "Terminated",
    "TransientError",
    "UsageError",
]


class SwiftError(Exception):
    """A failure with an explanation. The command line prints it without a traceback.

    Args:
        message: what happened, one sentence without a full stop at the end.
        where: the place the user can look at: ``run.yaml:12``, ``data.jsonl:57`` or ``--flag``.
        why: the cause, when the message alone does not tell it.
        fix: something the user can do or paste.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """Lines for the terminal: ``where: message``, then ``cause:`` and ``fix:`` where known."""
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.why:
            lines.append(f"  cause: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def one_line(self) -> str:
        """What happened, where and the fix."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.fix}" if self.fix else text


class Terminated(SystemExit):
    """SIGTERM has come: what is open is closed on the way out, as after Ctrl-C."""


class TransientError(SwiftError):
    """Somebody else died or did not answer in time: the same again may succeed (the queue tries it)."""


class UsageError(SwiftError):
    """The command was called wrongly (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """An option has a wrong value, or options contradict each other."""


class DataError(SwiftError):
    """The data cannot be used as it is."""


class ModelError(SwiftError):
    """The model folder is incomplete, unknown, or does not fit what was asked."""


class HubError(SwiftError):
    """A hub cannot be reached, refuses what is asked, or sends something else."""


class NotOnHub(HubError):
    """The hub does not have it, or does not say so to a stranger."""
