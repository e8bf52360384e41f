"""Files that are either whole or absent: write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "atomic_directory",
    "atomic_write_json",
    "atomic_write_text",
    "folder_bytes",
    "free_bytes",
    "fsync_directory",
    "read_json",
    "replace_symlink",
]


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
"""Read once, while there is one thread: two threads doing this at the same time could leave it at 0."""


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable (a no-op where directories cannot be opened)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``text`` in one step; a reader sees the old or the new content, never a part.

    ``durable=False`` leaves out the fsync, for files rewritten every few seconds (a heartbeat).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_UMASK)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is not there (yet) or is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def atomic_write_json(path: Path, value: Any, *, durable: bool = True, indent: int | None = 2) -> None:
    """``atomic_write_text`` of ``value`` as JSON."""
    atomic_write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n", durable=durable)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder, then rename it to ``path``.

    Every file is fsynced before the rename, so that after a crash ``path`` is either complete or absent.
    An existing ``path`` is replaced. When the block raises, nothing is left behind. A killed process leaves
    ``.NAME.partial-*`` folders, which ``remove_partial`` clears.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for root, folders, files in os.walk(temporary):
            for name in files:
                _fsync_file(Path(root) / name)
            for name in folders:
                fsync_directory(Path(root) / name)
        fsync_directory(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_partial(parent: Path) -> int:
    """Delete what ``atomic_directory`` left in ``parent`` when its process was killed; returns how many."""
    leftovers = list(parent.glob(".*.partial-*"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return len(leftovers)


def replace_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` (relative to the link's folder) without a moment in which it is missing."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` (or its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def folder_bytes(path: Path) -> int:
    """Total size of the regular files below ``path``."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
