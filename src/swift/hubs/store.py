"""Repositories on disk: the layout of Hugging Face's cache, used for both hubs, and a plain folder (``local_dir``).

``blobs/HASH`` holds contents, ``snapshots/COMMIT/PATH`` are links to them, ``refs/REVISION`` names the commit that a
branch or tag meant when it was last asked for. ``swift/COMMIT.json`` is ours: the hub's list of files with sizes and
hashes, from which completeness is judged and contents are checked without the network.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from swift.core.files import atomic_write_json, atomic_write_text
from swift.hubs.types import Hub, HubFile, Listing, Repo

__all__ = ["Store"]


class Store:
    """Where one repository lives on this machine.

    Args:
        local_dir: a plain folder instead of the cache.
    """

    def __init__(self, hub: Hub, repo: Repo, local_dir: Path | None = None) -> None:
        self.hub, self.repo, self.local_dir = hub, repo, local_dir
        self.root = hub.storage(repo) if local_dir is None else local_dir / ".cache" / "swift"
        self.revision = repo.revision or hub.default_revision

    def known_commit(self) -> str | None:
        """The commit that the revision meant when it was last asked for, or is."""
        ref = self.root / "refs" / self.revision
        if ref.is_file():
            return ref.read_text(encoding="utf-8").strip()
        # ModelScope's own client names folders by revision, and a commit has no entry in refs.
        known = (self.root / "snapshots" / self.revision).is_dir() or self._record(self.revision).is_file()
        return self.revision if known else None

    def folder(self, commit: str) -> Path:
        """The folder that a model or data set is read from."""
        return self.local_dir or self.root / "snapshots" / commit

    def _record(self, commit: str) -> Path:
        return self.root / "swift" / f"{commit}.json"

    def listing(self, commit: str) -> Listing | None:
        """The hub's list of files as it was when ``commit`` was downloaded by us; None when it was not."""
        record = self._record(commit)
        if not record.is_file():
            return None
        values = json.loads(record.read_text(encoding="utf-8"))
        return Listing(values["commit"], tuple(HubFile(**file) for file in values["files"]))

    def remember(self, listing: Listing) -> None:
        """Write down what the hub says, before any file comes."""
        files = [asdict(file) for file in listing.files]
        page = self.hub.page(self.repo)
        record = {"from": page, "revision": self.revision, "commit": listing.commit, "files": files}
        atomic_write_json(self._record(listing.commit), record)

    def missing(self, files: Iterable[HubFile], commit: str) -> list[HubFile]:
        """Those of ``files`` that are absent or of another size."""
        folder = self.folder(commit)
        return [file for file in files if not _has_size(folder / file.path, file.size)]

    def part(self, file: HubFile) -> Path:
        """Where an unfinished file is kept; one content has one place, whatever commit it belongs to."""
        return self.root / "blobs" / f"{file.key}.swift-part"

    def held(self, file: HubFile) -> int:
        """Bytes of ``file`` that need not be fetched again."""
        if self.has_content(file):
            return file.size
        part = self.part(file)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def _blob(self, file: HubFile) -> Path:
        return self.root / "blobs" / file.key

    def has_content(self, file: HubFile) -> bool:
        """Whether the content is here already, from another commit or not yet linked."""
        return file.has_hash and _has_size(self._blob(file), file.size)

    def keep(self, file: HubFile) -> None:
        """A checked part becomes content."""
        self.part(file).replace(self._blob(file))

    def publish(self, files: Iterable[HubFile], listing: Listing) -> Path:
        """Make contents visible under their names, config.json last, then let the revision mean this commit."""
        folder = self.folder(listing.commit)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files, key=lambda file: (file.path == "config.json", file.path)):
            target, blob = folder / file.path, self._blob(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if self.local_dir is not None:
                # A second name, no second copy; the first name goes away below.
                os.link(blob, target)
            else:
                target.symlink_to(os.path.relpath(blob, target.parent))
        if self.local_dir is not None:
            shutil.rmtree(self.root / "blobs", ignore_errors=True)
        if self.revision != listing.commit:
            atomic_write_text(self.root / "refs" / self.revision, listing.commit)
        return folder

    def discard(self, file: HubFile, commit: str) -> None:
        """Delete a damaged file, name and content."""
        path = self.folder(commit) / file.path
        content = path.resolve()
        path.unlink(missing_ok=True)
        content.unlink(missing_ok=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
