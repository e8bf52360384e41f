"""Where the experiment service keeps its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from swift.core.errors import SwiftError
from swift.core.home import swift_home

__all__ = ["Home"]


@dataclass(frozen=True)
class Home:
    """``SWIFT_HOME`` (default ``~/.swift``): everything the service owns lies below it."""

    root: Path

    @classmethod
    def find(cls, path: str | Path | None = None) -> Home:
        """The given folder, else ``$SWIFT_HOME``, else ``~/.swift``; made private to the user when it is new.

        Raises SwiftError when it cannot be made.
        """
        root = Path(path).expanduser().absolute() if path else swift_home()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise cls(root).unusable("the home of the experiment service cannot be made", error) from error
        return cls(root)

    def unusable(self, message: str, error: OSError) -> SwiftError:
        """The error for a home that cannot be used because of ``error``."""
        fix = "SWIFT_HOME=/a/folder/you/may/write"
        return SwiftError(message, where=str(self.root), why=error.strerror, fix=fix)

    @property
    def store(self) -> Path:
        return self.root / "store.sqlite3"

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    @property
    def service_file(self) -> Path:
        """Process identity and address of the running service."""
        return self.root / "service.json"

    @property
    def service_log(self) -> Path:
        return self.root / "service.log"

    @property
    def warm_socket(self) -> Path:
        return self.root / "warm.sock"

    def job_dir(self, job_id: str) -> Path:
        return self.root / "jobs" / job_id

    def attempt_dir(self, job_id: str, attempt: int) -> Path:
        return self.job_dir(job_id) / f"attempt-{attempt}"
