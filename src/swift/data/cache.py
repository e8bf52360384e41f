"""Token stores on disk, found again by what they were made from.

The key is a hash of the content of the files (and their paths, which the locations name), the rows taken, the
renamed columns, the template's fingerprint, max_length and the truncation policy. So a changed file,
template, tokenizer or option makes a new entry, and nothing is ever out of date. Entries live in
``$SWIFT_HOME/cache/tokens`` (default ``~/.cache/swift/tokens``); deleting them is safe at any time. When they take more
than ``token_cache_gib`` those used longest ago are deleted.

A cache that cannot be read or written never stops a run: the tokens are made again, kept in memory, and a
note says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from swift.core.logging import get_logger
from swift.data.store import CorruptStoreError, TokenStore

__all__ = ["cache_root", "cached_store", "content_key"]

logger = get_logger(__name__)

_LEFTOVER_SECONDS = 24 * 3600


def cache_root() -> Path:
    """Where token stores are kept."""
    home = os.environ.get("SWIFT_HOME")
    if home:
        return Path(home).expanduser() / "cache" / "tokens"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "swift" / "tokens"


def content_key(files: Iterable[Path], *facts: object) -> str:
    """Hash of the files' paths and contents and of ``facts`` (by their ``repr``)."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr(facts).encode())
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=20))
        digest.update(repr((str(file), content.hexdigest())).encode())
    return digest.hexdigest()


def cached_store(
    key: str,
    make: Callable[[], Iterable[TokenStore]],
    *,
    reuse: bool,
    notes: list[str],
    limit_bytes: int | None = None,
) -> TokenStore:
    """The store under ``key``, or one made of the parts that ``make`` gives and kept under ``key``.

    Args:
        reuse: False makes the entry anew.
        limit_bytes: what all entries may take; those used longest ago are deleted for a new one, except those used
            within a day (a run may be about to open them).
        notes: gets a sentence when the cache is damaged or cannot be written.
    """
    path = cache_root() / key
    if reuse:
        try:
            store = TokenStore.open(path)
            logger.info("tokens from the cache: %s", path)
            with contextlib.suppress(OSError):  # a cache that is only read cannot tell its use
                os.utime(path)
            return store
        except OSError:
            pass  # not there, or not readable: then writing says why
        except CorruptStoreError as error:
            notes.append(f"the token cache was damaged and is made again ({error})")
    _clear_leftovers(path.parent)
    making = _Guard(make)
    try:
        store = TokenStore.write(path, making)
        if limit_bytes is not None:
            _evict(path.parent, limit_bytes)
        return store
    except OSError as error:
        if making.failed:  # the error is not the disk's
            raise
        try:
            return TokenStore.open(path)  # another process was faster
        except (OSError, CorruptStoreError):
            notes.append(f"tokens are not cached: {error.strerror or error} ({path.parent})")
    return TokenStore.join(make())


def _evict(root: Path, limit_bytes: int) -> None:
    """Delete the entries used longest ago until the rest is within the limit."""
    entries = []
    for entry in root.iterdir():
        with contextlib.suppress(OSError):  # another process deletes as well
            if entry.is_dir() and not entry.name.startswith("."):
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in entries)
    for used, size, entry in sorted(entries):
        if total <= limit_bytes or time.time() - used < _LEFTOVER_SECONDS:
            return
        shutil.rmtree(entry, ignore_errors=True)
        logger.info("token cache beyond its limit: %s deleted", entry)
        total -= size


def _clear_leftovers(root: Path) -> None:
    """Delete what killed processes left half-written. A day is longer than anybody tokenises one data set."""
    for leftover in root.glob(".*.partial-*"):
        with contextlib.suppress(OSError):  # another process clears the same
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


class _Guard:
    """Iterates over what ``make`` gives and remembers whether that, not its consumer, failed."""

    def __init__(self, make: Callable[[], Iterable[TokenStore]]) -> None:
        self.make = make
        self.failed = False

    def __iter__(self) -> Iterator[TokenStore]:
        try:
            yield from self.make()
        except OSError:
            self.failed = True
            raise
