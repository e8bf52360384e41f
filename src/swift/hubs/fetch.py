"""Download a repository, or find it on this machine, or check what is here."""

from __future__ import annotations

import contextlib
import errno
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swift.core.errors import HubError, SwiftError
from swift.core.files import free_bytes
from swift.core.format import format_bytes
from swift.hubs.bar import Bar
from swift.hubs.clients import is_offline
from swift.hubs.refusals import unreachable
from swift.hubs.select import wanted_files
from swift.hubs.store import Store
from swift.hubs.transfer import Cancelled, Transfer, is_intact, reach, within
from swift.hubs.types import PATIENCE, Hub, HubFile, Listing, Patience, Repo
from swift.runs.lock import FolderLock

__all__ = ["Choice", "Fetched", "Verified", "fetch", "find_cached", "verify"]


@dataclass(frozen=True)
class Choice:
    """Which files, and where to.

    Attributes:
        include: shell patterns; empty: what `swift.hubs.select.wanted_files` takes of itself.
        exclude: shell patterns of files left out.
        local_dir: a plain folder instead of the cache.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    local_dir: Path | None = None

    def of(self, listing: Listing, repo: Repo) -> list[HubFile]:
        files = wanted_files(listing.files, repo.kind, self.include, self.exclude)
        if not files:
            raise HubError(
                "no file is left to fetch",
                where=str(repo),
                why=f"{len(listing.files)} files are there, none matches",
                fix="change --include or --exclude",
            )
        return files


_ALL = Choice()


@dataclass(frozen=True)
class Fetched:
    """A repository on this machine: its folder, its commit, and the bytes that came over the network for it."""

    folder: Path
    commit: str
    received: int = 0


@dataclass
class Verified:
    """What `verify` found: files that are the hub's, that are damaged (now deleted), and that are not here."""

    good: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def find_cached(
    hub: Hub, repo: Repo, choice: Choice = _ALL, *, usable: Callable[[Path], bool] | None = None
) -> Fetched | None:
    """The repository as it lies on this machine, without any network; None when a part is missing.

    Args:
        usable: judges a folder that another program downloaded, for which there is no list of files.
    """
    store = Store(hub, repo, choice.local_dir)
    commit = store.known_commit()
    if commit is not None:
        listing = store.listing(commit)
        if listing is not None and not store.missing(choice.of(listing, repo), commit):
            return Fetched(store.folder(commit), commit)
    if usable is None or choice.local_dir is not None:
        return None
    folders = [] if commit is None else [(store.folder(commit), commit)]
    if repo.revision is None:
        folders += [(folder, "unknown") for folder in hub.older_folders(repo)]
    return next(
        (Fetched(folder, known) for folder, known in folders if folder.is_dir() and usable(folder)), None
    )


def fetch(hub: Hub, repo: Repo, choice: Choice = _ALL, patience: Patience = PATIENCE) -> Fetched:
    """Ask the hub what ``repo`` is now, and bring the files that are not here.

    Writes one line to stderr: the first half before the network is used, the second when the size is known. A
    download that ends early keeps what it received; nothing of it is visible under a file's name before all files
    are complete and checked.

    Raises:
        HubError: no network, refusal, damaged content, full disk; each with what to do.
    """
    if is_offline():
        raise HubError(
            f"{repo} is not on this machine",
            where=hub.title,
            why="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network",
            fix=f"unset it and run: swift download {repo.name}; or give a local folder",
        )
    store = Store(hub, repo, choice.local_dir)
    with _line(f"{repo.kind} {repo} from {hub.title} ({hub.endpoint}): ") as say:
        listing = _ask(hub, repo, patience)
        files = choice.of(listing, repo)
        missing = store.missing(files, listing.commit)
        needed = sum(file.size - store.held(file) for file in missing)
        size = format_bytes(sum(file.size for file in files))
        left = "all here" if not missing else f"{format_bytes(needed)} to fetch"
        say(f"{len(files)} files, {size}, {left}; {store.folder(listing.commit)}")
    with _writing(store, hub):
        store.root.mkdir(parents=True, exist_ok=True)
        with _alone(store):
            missing = store.missing(files, listing.commit)
            received = _bring(store, listing, missing, patience) if missing else 0
            folder = store.publish(missing, listing)
    return Fetched(folder, listing.commit, received)


def _ask(hub: Hub, repo: Repo, patience: Patience) -> Listing:
    hub.load_client()  # not within the deadline: on a busy machine imports take seconds
    reach(hub, patience)
    try:
        return within(patience.answer, lambda: hub.listing(repo))
    except TimeoutError as error:
        raise unreachable(hub, error, "the list of files", patience.answer) from error


@contextlib.contextmanager
def _line(start: str) -> Iterator[Callable[[str], None]]:
    """One line on stderr that is ended whatever happens."""
    print(start, end="", file=sys.stderr, flush=True)
    ends = ["failed"]
    try:
        yield ends.append
    finally:
        print(ends[-1], file=sys.stderr, flush=True)


@contextlib.contextmanager
def _writing(store: Store, hub: Hub) -> Iterator[None]:
    fix = f"--local_dir on another disk, or {hub.cache_variable}=FOLDER"
    try:
        yield
    except PermissionError as error:
        raise HubError("cannot be written", where=str(error.filename or store.root), fix=fix) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise HubError(
            "the download cannot be written",
            where=str(store.root),
            why=error.strerror,
            fix=f"free some space; {fix}",
        ) from error


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Wait for another process that writes the same repository; it probably fetches what we need."""
    lock: FolderLock | None = None
    told = False
    while lock is None:
        try:
            lock = FolderLock(store.root)
        except SwiftError as error:
            if not told:
                holder = error.message.partition(" by ")[2]
                print(
                    f"{holder} is downloading {store.repo.name}; waiting for it", file=sys.stderr, flush=True
                )
            told = True
            time.sleep(0.5)
    try:
        yield
    finally:
        lock.release()


def _bring(store: Store, listing: Listing, files: list[HubFile], patience: Patience) -> int:
    """Fetch and check every one of ``files``; returns the bytes received."""
    todo = [file for file in {file.key: file for file in files}.values() if not store.has_content(file)]
    held = sum(store.held(file) for file in todo)
    needed = sum(file.size for file in todo) - held
    free = free_bytes(store.root)
    if needed > free:
        raise HubError(
            f"{format_bytes(needed)} are to be fetched, {format_bytes(free)} are free",
            where=str(store.root),
            fix=f"free some space, or {store.hub.cache_variable}=FOLDER on another disk (or --local_dir)",
        )
    store.remember(listing)
    cancelled = threading.Event()
    with Bar(store.repo.name, needed + held, held) as bar:
        transfer = Transfer(store.hub, store.repo, listing.commit, patience, bar.add, cancelled)

        def one(file: HubFile) -> None:
            transfer.fetch(file, store.part(file))
            store.keep(file)

        try:
            _in_parallel(one, sorted(todo, key=lambda file: -file.size), patience.workers, cancelled)
        finally:
            transfer.close()
        return bar.received


def _in_parallel(
    work: Callable[[HubFile], None], files: Sequence[HubFile], workers: int, cancelled: threading.Event
) -> None:
    """``work`` on every file; the first failure stops the others.

    Threads are daemons: after Ctrl-C nobody waits for a silent server.
    """
    todo: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for file in files:
        todo.put(file)

    def run() -> None:
        while not cancelled.is_set():
            try:
                work(todo.get_nowait())
                done.put(None)
            except queue.Empty:
                return
            except BaseException as error:  # raised again by the caller's thread
                done.put(error)
                return

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(files)))]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            failure = done.get()
            if failure is not None and not isinstance(failure, Cancelled):
                raise failure
    finally:
        cancelled.set()
        for thread in threads:
            thread.join(1)


def verify(
    hub: Hub, repo: Repo, choice: Choice = _ALL, patience: Patience = PATIENCE
) -> tuple[Fetched, Verified]:
    """Hash every file that is here and compare with the hub's list: the one kept at the download, else asked for.

    Damaged files are deleted, so that the next download brings them again.

    Raises:
        HubError: nothing of the repository is here.
    """
    store = Store(hub, repo, choice.local_dir)
    commit = store.known_commit()
    if commit is None:
        raise HubError(
            f"{repo} is not on this machine", where=str(store.root), fix=f"swift download {repo.name}"
        )
    listing = store.listing(commit)
    if listing is None:
        with _line(f"{repo.kind} {repo} from {hub.title} ({hub.endpoint}): ") as say:
            listing = _ask(hub, Repo(repo.kind, repo.name, commit), patience)
            say(f"the hashes of {len(listing.files)} files")
    files, report = choice.of(listing, repo), Verified()
    absent = {file.path for file in files if not (store.folder(commit) / file.path).is_file()}
    report.missing = sorted(absent)
    here = [file for file in files if file.path not in absent]
    with Bar(f"checking {repo.name}", sum(file.size for file in here)) as bar:
        for file in here:
            if is_intact(store.folder(commit) / file.path, file):
                report.good += 1
            else:
                report.damaged.append(file.path)
                store.discard(file, commit)
            bar.add(file.size)
    return Fetched(store.folder(commit), commit), report
