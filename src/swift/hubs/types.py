"""What is asked of a hub, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from swift.core.errors import HubError

__all__ = ["PATIENCE", "Hub", "HubFile", "Listing", "Patience", "Repo"]

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repo:
    """A model or data set on a hub.

    Attributes:
        name: ``owner/name``.
        revision: branch, tag or commit; None: the hub's default branch.
    """

    kind: Kind
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f" at {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubFile:
    """One file as the hub describes it: path with slashes, bytes, and the hashes the hub knows.

    ``git_sha1`` is git's hash of the file as a blob: what Hugging Face has for files that are not in LFS.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str:
        """Name of the file's content in a cache."""
        return self.sha256 or self.git_sha1 or self.path.replace("/", "--")

    @property
    def has_hash(self) -> bool:
        return bool(self.sha256 or self.git_sha1)


@dataclass(frozen=True)
class Listing:
    """All files of one commit."""

    commit: str
    files: tuple[HubFile, ...]

    def __post_init__(self) -> None:
        for name in (self.commit, *(file.path for file in self.files)):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise HubError("the hub names a file outside of the repository", where=name)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what. Seconds.

    Attributes:
        reach: for the hub to answer at all.
        answer: for the list of files.
        stall: without one byte of a file.
        attempts: tries in a row that bring no byte before a file is given up.
        pause: before the second try; doubles each time.
        workers: files at a time.
    """

    reach: float = 10
    answer: float = 60
    stall: float = 30
    attempts: int = 4
    pause: float = 1
    workers: int = 8


PATIENCE = Patience()


class Hub(Protocol):
    """One hub, spoken to through its own client library.

    Attributes:
        title: "Hugging Face" or "ModelScope".
        endpoint: its address, without a slash at the end.
        cache: the folder of its client's cache.
        cache_variable: environment variable that moves that folder.
        token_variable: environment variable with the user's token.
        default_revision: the branch that is meant when none is named.
    """

    title: str
    endpoint: str
    cache: Path
    cache_variable: str
    token_variable: str
    default_revision: str

    def load_client(self) -> None:
        """Import the client library. Raises HubError when it is not installed."""
        ...

    def storage(self, repo: Repo) -> Path:
        """Folder of one repository in the cache."""
        ...

    def older_folders(self, repo: Repo) -> list[Path]:
        """Where earlier versions of the client put a whole repository."""
        ...

    def page(self, repo: Repo) -> str:
        """Address a person opens in a browser."""
        ...

    def listing(self, repo: Repo) -> Listing:
        """Ask for the files of ``repo``. Raises HubError for what the hub refuses."""
        ...

    def request(self, repo: Repo, commit: str, path: str) -> tuple[str, dict[str, str]]:
        """Address and headers that get one file."""
        ...
