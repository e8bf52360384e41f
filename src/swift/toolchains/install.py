"""Installing a toolchain: aside, in an order that can be taken up again, tested before anybody sees it.

A virtual environment cannot be moved (its scripts hold its path), so nothing is renamed: each lock gets a folder of its
own (``env-DIGEST``), and ``toolchain.json``, written last and in one step, says which one counts. What an interrupted
installation left is taken up again by the same command, or deleted by the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from swift.core.devices import nvidia_memory
from swift.core.errors import UsageError
from swift.core.files import atomic_write_json, folder_bytes, free_bytes
from swift.core.format import format_bytes
from swift.toolchains.child import Child, ToolchainError, clean_environment
from swift.toolchains.lock import Lock, Step, read_lock
from swift.toolchains.toolchain import IN_USE, RECORD, Toolchain, check_name, find_toolchain, toolchain_folder

__all__ = ["Installation", "install", "installed_versions", "remove", "smoke_test"]

SMOKE_FOLDER = Path(__file__).with_name("smoke")
STAGE_SECONDS = 3600.0
SMOKE_SECONDS = 3600.0
LOG = "install.log"
INDEX_SETTINGS = (
    *(
        "CONFIG_FILE",
        "INDEX_URL",
        "EXTRA_INDEX_URL",
        "FIND_LINKS",
        "TRUSTED_HOST",
        "CERT",
        "CLIENT_CERT",
        "PROXY",
    ),
    *("CACHE_DIR", "NO_CACHE_DIR", "DEFAULT_TIMEOUT", "TIMEOUT", "RETRIES", "KEYRING_PROVIDER", "NO_INDEX"),
)
"""Settings of pip (PIP_...) that say where packages come from. The others (constraints, target folders, ...) are meant
for other environments."""


@dataclass(frozen=True)
class Installation:
    """What is asked for.

    Attributes:
        name: the toolchain.
        variant: ``cpu`` or ``cuda``; None: what this machine has.
        wheels: folder of wheels; then no index is asked.
        arguments: for ``pip install``, after ours.
        installer: ``uv`` or ``pip``; None: uv when it is on PATH.
        stage_seconds: longest time one step may take.
        locks, smoke: where locks and smoke tests are.
        say: gets lines of progress.
        free: tells the free bytes of a disk.
    """

    name: str
    variant: str | None = None
    wheels: Path | None = None
    arguments: tuple[str, ...] = ()
    installer: str | None = None
    stage_seconds: float = STAGE_SECONDS
    locks: Path | None = None
    smoke: Path = SMOKE_FOLDER
    say: Callable[[str], None] = field(default=print, repr=False)
    free: Callable[[Path], int] = field(default=free_bytes, repr=False)


def install(wanted: Installation) -> Toolchain:
    """Make the toolchain, test it and record it; one that is there already in this form is returned as it is.

    Raises:
        UsageError: no such toolchain, variant or wheel folder.
        ToolchainError: another process installs it, the disk is too small, a step failed (with the end of its
            output), took too long, or the smoke test failed. What was installed before is untouched.
    """
    name = check_name(wanted.name)
    variant = wanted.variant or ("cuda" if nvidia_memory() else "cpu")
    lock = read_lock(name, variant, wanted.locks) if wanted.locks else read_lock(name, variant)
    if wanted.wheels is not None and not wanted.wheels.is_dir():
        raise UsageError(f"there is no folder {wanted.wheels}", where="--wheels")
    folder = toolchain_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder, name):
        environment = folder / f"env-{_digest(lock, wanted)}"
        with contextlib.suppress(ToolchainError):
            present = find_toolchain(name)
            if present.environment == environment:
                wanted.say(f"{name} is installed in {environment}")
                return present
        _clear(folder, keep=environment)
        _check_disk(wanted, lock, environment)
        return _Work(wanted, name, variant, lock, environment).run()


def _digest(lock: Lock, wanted: Installation) -> str:
    what = [lock.path.stem, lock.digest, platform.python_version(), sys.base_prefix, *wanted.arguments]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _only_one(folder: Path, name: str) -> Iterator[None]:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 100).decode() or "another process"
            raise ToolchainError(
                f"the toolchain {name} is being installed or removed by {holder}",
                where=str(folder),
                fix=f"wait for it; its log is {folder / LOG}",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path, keep: Path | None) -> list[Path]:
    """Delete environments that neither the record nor ``keep`` names, unless something runs in them; returns those
    that stay for that reason.
    """
    try:
        recorded = json.loads((folder / RECORD).read_text())["environment"]
    except FileNotFoundError:
        recorded = None
    busy = []
    for environment in folder.glob("env-*"):
        if environment == keep or environment.name == recorded:
            continue
        if in_use(environment):
            busy.append(environment)
        else:
            shutil.rmtree(environment)
    return busy


def in_use(environment: Path) -> bool:
    """Whether a process of ours has something running in this environment."""
    try:
        descriptor = os.open(environment / IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _check_disk(wanted: Installation, lock: Lock, environment: Path) -> None:
    there = folder_bytes(environment) if environment.exists() else 0
    needed, free = lock.disk_bytes - there, wanted.free(environment.parent)
    if needed > free:
        raise ToolchainError(
            f"not enough disk: the toolchain takes {format_bytes(needed)}, {format_bytes(free)} are free",
            where=str(environment.parent),
            fix="free some space, or choose another disk: export SWIFT_HOME=/path/with/space",
        )


def remove(name: str) -> int:
    """Delete a toolchain and what interrupted installations left; returns the bytes freed.

    Raises ToolchainError when it is not there, or something runs in it.
    """
    name = check_name(name)
    folder = toolchain_folder(name)
    if not folder.exists():
        raise ToolchainError(f"the toolchain {name} is not installed", where=str(folder))
    with _only_one(folder, name):
        if any(in_use(environment) for environment in folder.glob("env-*")):
            raise ToolchainError(
                f"the toolchain {name} is in use",
                where=str(folder),
                fix="stop the server or job that runs in it",
            )
        size = folder_bytes(folder)
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return size


def installed_versions(environment: Path) -> dict[str, str]:
    """Distribution (lower case, hyphens) -> version, read from the files of an environment."""
    found = {}
    for distribution in metadata.distributions(path=[str(site) for site in _site_packages(environment)]):
        name = distribution.metadata["Name"]
        if name:
            found[name.lower().replace("_", "-")] = distribution.version
    return found


def _site_packages(environment: Path) -> list[Path]:
    return sorted(environment.glob("lib/python*/site-packages"))


def smoke_test(toolchain: Toolchain, folder: Path = SMOKE_FOLDER, log: Path | None = None) -> dict[str, Any]:
    """Run the toolchain's smoke test: an import and one real operation. Raises ToolchainError when it fails."""
    begin = time.monotonic()
    script = folder / f"{toolchain.name.replace('-', '_')}.py"
    result = toolchain.run(script, {}, deadline_seconds=SMOKE_SECONDS, stage="smoke test", log=log)
    return {"seconds": round(time.monotonic() - begin, 1), "result": result, "time": _now()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class _Work:
    """One installation under way."""

    wanted: Installation
    name: str
    variant: str
    lock: Lock
    environment: Path

    def run(self) -> Toolchain:
        begin = time.monotonic()
        self.log = self.environment.parent / LOG
        self.uv = self._find_installer()
        self.wanted.say(f"{self.name} ({self.variant}) into {self.environment}; log {self.log}")
        self._notes()
        self._make_environment()
        self._drop_halves()
        for number, step in enumerate(self.lock.steps, 1):
            title = f"[{number}/{len(self.lock.steps)}] {step.title}, {len(step.pins)} package(s)"
            self.wanted.say(title)
            self._install(number, step)
        for new, old in self.lock.aliases:
            _alias(_site_packages(self.environment)[0], new, old)
        self._compare()
        record = {
            "name": self.name,
            "variant": self.variant,
            "environment": self.environment.name,
            "variables": self.lock.variables,
            "python": platform.python_version(),
            "installer": "uv" if self.uv else "pip",
            "arguments": list(self.wanted.arguments),
            "lock": self.lock.digest,
            "tested_by_us": self.lock.tested,
            "versions": installed_versions(self.environment),
        }
        toolchain = Toolchain(self.name, self.environment, record)
        self.wanted.say("smoke test")
        record["smoke"] = smoke_test(toolchain, self.wanted.smoke, self.log)
        record["disk_bytes"] = folder_bytes(self.environment)
        record["installed"] = _now()
        record["seconds"] = round(time.monotonic() - begin, 1)
        atomic_write_json(self.environment.parent / RECORD, record)
        _clear(self.environment.parent, keep=None)
        return toolchain

    def _notes(self) -> None:
        here = ".".join(platform.python_version_tuple()[:2])
        if here != self.lock.python:
            self.wanted.say(
                f"warning: these versions were chosen with Python {self.lock.python}; this is Python {here}"
            )
        if not self.lock.tested:
            self.wanted.say(
                "warning: these versions come from the packages' metadata; we have not run them on such a machine"
            )

    def _find_installer(self) -> str | None:
        """Path of uv, or None for pip."""
        uv = shutil.which("uv")
        if self.wanted.installer == "uv" and uv is None:
            raise UsageError(
                "uv is not on PATH", where="--installer", fix="pip install uv, or --installer pip"
            )
        if uv is not None and self.wanted.installer != "pip":
            return uv
        try:
            # Not find_spec("pip"): looking for that module makes setuptools' import hook give up its own distutils
            # for the rest of the process, and torch.utils.cpp_extension cannot be imported any more.
            metadata.version("pip")
        except metadata.PackageNotFoundError:
            raise ToolchainError(
                "there is neither uv on PATH nor pip beside this Python",
                where=sys.executable,
                fix="python -m ensurepip, or install uv",
            ) from None
        return None

    def _command(self, title: str, command: list[str]) -> list[str]:
        """Run one command of the installation; returns the end of its output. Raises ToolchainError."""
        child = Child(command, environment=self._variables(), log=self.log, stream=True)
        with child:
            try:
                code = child.follow(self.wanted.stage_seconds, self._progress)
            except TimeoutError:
                raise self._failure(
                    f"{title} took longer than {self.wanted.stage_seconds:g} s and was stopped",
                    child.log_tail(),
                    "the same command goes on where it stopped; --deadline SECONDS allows more",
                ) from None
        if code:
            raise _CommandFailed(child.log_tail())
        return list(child.tail)

    def _progress(self, line: str) -> None:
        if line.lstrip().startswith(("Downloading", "Building", "Installing", "Using cached", "Installed")):
            self.wanted.say(f"  {line.strip()[:100]}")

    def _variables(self, step: Step | None = None) -> dict[str, str]:
        cleaned = clean_environment(self.environment)
        settings = {f"PIP_{key}" for key in INDEX_SETTINGS}
        # uv's own variables and settings of where packages come from; with a wheel folder nothing else counts.
        if self.wanted.wheels is None:
            cleaned |= {k: v for k, v in os.environ.items() if k in settings or k.startswith("UV_")}
        return cleaned | dict(self._step.variables if self._step else ())

    _step: Step | None = None

    def _make_environment(self) -> None:
        if (self.environment / "made").exists():
            self.wanted.say("going on with an interrupted installation")
            return
        make = [sys.executable, "-P", "-m", "venv", "--without-pip", str(self.environment)]
        if self.uv:
            make = [
                self.uv,
                "venv",
                "--quiet",
                "--allow-existing",
                "--python",
                sys.executable,
                str(self.environment),
            ]
        try:
            self._command("making the environment", make)
        except _CommandFailed as error:
            raise self._failure("the environment cannot be made", error.tail, None) from None
        (self.environment / "made").touch()

    def _drop_halves(self) -> None:
        """Forget packages whose installation was cut off: RECORD is the last file that is written."""
        for site in _site_packages(self.environment):
            for info in site.glob("*.dist-info"):
                if not (info / "RECORD").exists():
                    shutil.rmtree(info)

    def _install(self, number: int, step: Step) -> None:
        self._step = step
        pins = self.environment / f"step-{number}.txt"
        pins.write_text("\n".join(step.pins) + "\n")
        python = str(self.environment / "bin" / "python")
        if self.uv:
            command = [self.uv, "pip", "install", "--python", python]
        else:
            command = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "--no-input"]
            # Compiling all of torch takes longer than copying it; Python compiles what is imported.
            command += ["--disable-pip-version-check", "--progress-bar", "off", "--no-compile"]
        command += ["--no-deps", *step.options]
        if self.wanted.wheels is not None:
            command += ["--no-index", "--find-links", str(self.wanted.wheels)]
        command += [*self.wanted.arguments, "-r", str(pins)]
        title = f"installing {step.title}"
        try:
            self._command(title, command)
        except _CommandFailed as error:
            if step.fallback_index is None or self.wanted.wheels is not None:
                raise self._failure(f"{title} failed", error.tail, self._advice(error.tail)) from None
            self.wanted.say(f"  not in the index in use; trying {step.fallback_index}")
            try:
                self._command(title, [*command, "--extra-index-url", step.fallback_index])
            except _CommandFailed as second:
                raise self._failure(f"{title} failed", second.tail, self._advice(second.tail)) from None
        finally:
            self._step = None

    def _advice(self, tail: str) -> str:
        if self.wanted.wheels is not None:
            return (
                f"fetch what is missing where there is a network: pip download --no-deps --dest {self.wanted.wheels}"
                f" -r {self.lock.path}"
            )
        if "No space left" in tail:
            return "free some space, or choose another disk: export SWIFT_HOME=/path/with/space"
        return "the same command goes on where it stopped; behind -- it takes options of pip, such as --index-url"

    def _failure(self, message: str, tail: str, fix: str | None) -> ToolchainError:
        errors = [line for line in tail.splitlines() if "error" in line.lower()]
        why = "\n".join(errors[-6:] or tail.splitlines()[-6:])
        return ToolchainError(message, where=str(self.log), why=why or None, fix=fix)

    def _compare(self) -> None:
        present, wanted = installed_versions(self.environment), self.lock.versions()
        wrong = [
            f"{name} {present.get(name, 'missing')} instead of {version}"
            for name, version in wanted.items()
            if present.get(name) != version
        ]
        if wrong and not self.wanted.arguments:
            raise self._failure("the environment is not what the lock says", "\n".join(wrong), None)


class _CommandFailed(Exception):
    def __init__(self, tail: str) -> None:
        super().__init__(tail)
        self.tail = tail


def _alias(site: Path, new: str, old: str) -> None:
    """Make the distribution ``old`` known as ``new`` too, for programs that ask for their own version."""
    stem = old.replace("-", "_")
    (info,) = site.glob(f"{stem}-*.dist-info")
    target = site / info.name.replace(stem, new.replace("-", "_"), 1)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(info, target)
    text = (target / "METADATA").read_text(encoding="utf-8")
    (target / "METADATA").write_text(
        text.replace(f"\nName: {old}\n", f"\nName: {new}\n", 1), encoding="utf-8"
    )
