"""Warm workers: a template process imports once what every job imports; jobs are forked from it.

``python -m swift.experiments.warm --socket PATH`` listens on a private unix socket. A request names an attempt's
folder; the template forks a supervisor, which forks the job, which runs ``swift COMMAND`` in-process instead of
executing a new Python. The rules that make this as good as a cold start:

- The template never runs a job, starts no thread, touches no device and keeps no file open; it checks so before
  each fork, and leaves when it does not hold. Everything it imported is frozen out of garbage collection, so that
  forks share its pages.
- The job gets its own session, signals, environment (all of it), folder, mask, input and output, arguments and
  random state before its first line, and ends with its own exit handlers.
- What was fixed while importing cannot be changed by a fork. So variables that are read then (`RELEVANT`), the
  Python executable and the installed code are part of the template's key: another value, another template.
- Supervisor and job live on when the template dies; the template ends when idle, after `MAX_FORKS` jobs, above
  `MAX_BYTES`, or with the process that asked last.

Only the template imports torch; `submit` is light.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

import swift
from swift.core.process import ProcessIdentity
from swift.experiments.home import Home
from swift.experiments.supervisor import EXIT_LOCKED, Supervisor, detach
from swift.experiments.types import Launch
from swift.experiments.warm_job import run_job

__all__ = ["short_address", "submit", "template_key"]

DEADLINE_SECONDS = 30.0
"""For an answer; a new template imports first."""
IDLE_SECONDS = 600.0
MAX_FORKS = 500
MAX_BYTES = 2 * 2**30
MAX_TEMPLATES = 2
"""For one home; a third makes the others leave (their jobs go on)."""
LOOK_SECONDS = 2.0
LEAVING_SECONDS = 5.0

RELEVANT = (
    "PYTHON", "LD_", "DYLD_", "MALLOC_", "GLIBC_", "MKL_", "OPENBLAS_", "BLIS_", "KMP_", "GOMP_", "OMP_", "ATEN_",
    "DNNL_", "ONEDNN_", "PYTORCH_", "TORCH_LOGS", "TORCH_SHOW", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "USE_",
    "XDG_", "MPL", "NPY_", "NUMPY_", "LANG", "LC_", "TZ", "HOME", "TOKENIZERS_",
)  # fmt: skip
"""Beginnings of the names of variables that Python or a library reads once, at start or import."""
PER_JOB = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_TOKEN")
"""Exceptions: torch is told the number of threads after the fork, and numpy's own pool is never used."""
AS_OURS = ("LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
"""Variables that can put other code into the process: where they differ from the service's, a job starts cold."""

PRELOADED = (
    "numpy", "torch", "torch.optim", "transformers", "transformers.modeling_utils",
    "transformers.tokenization_utils_tokenizers", "safetensors.torch", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "swift.cli.main", "swift.cli.training", "swift.cli.resume", "swift.train.run",
    "swift.train.callbacks.progress", "swift.plan.plan", "swift.runs.cards", "swift.runs.curves",
)  # fmt: skip


# The light side: asking for a warm job


def submit(home: Home, attempt: Path, launch: Launch, deadline_seconds: float) -> str | None:
    """Have a warm worker run this attempt; None when its supervisor has the job, else why it cannot.

    Starts the template where there is none. Raises nothing for a template that misbehaves: the caller starts
    the job cold. A template that answers too late finds the job taken.
    """
    refusal = _misfit(launch)
    if refusal is not None:
        return refusal
    request = {"attempt": str(attempt), "owner": ProcessIdentity.of().to_dict(), "umask": _umask()}
    deadline = time.monotonic() + max(deadline_seconds, DEADLINE_SECONDS)
    try:
        with contextlib.closing(_connect(home, launch, deadline)) as connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.makefile("rb").readline()
    except ConnectionError:
        answer = b""
    except OSError as error:
        return f"no warm worker: {error}"
    if not answer:
        return f"the warm worker died, see {_log(home)}"
    refused = json.loads(answer).get("refused")
    return None if refused is None else str(refused)


def _misfit(launch: Launch) -> str | None:
    """Why no template can run this, None when one can."""
    if launch.argv[1:3] != ["-m", "swift"]:
        return "not a `python -m swift` command"
    if Path(launch.argv[0]).absolute() != Path(sys.executable).absolute():
        return "another Python"
    for name in AS_OURS:
        if launch.env.get(name) != os.environ.get(name):
            return f"{name} differs from the service's"
    return None


def template_key(launch: Launch) -> str:
    """Which template fits: Python, the code it has installed, and the relevant environment."""
    parts = [launch.argv[0], _code_version(), sorted(_relevant(launch.env).items())]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


def _relevant(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(RELEVANT) and name not in PER_JOB}


def _code_version() -> list[int]:
    """Changes when our source or the set of installed packages changes; a template does not see that."""
    own = Path(swift.__path__[0])
    newest = max(file.stat().st_mtime_ns for file in own.rglob("*.py"))
    folders = [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return [newest, *(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())]


def _umask() -> int:
    """Asking the system call means changing the mask for all threads for a moment, so the kernel's file first."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _log(home: Home) -> Path:
    return home.warm_socket.with_suffix(".log")


def _connect(home: Home, launch: Launch, deadline: float) -> socket.socket:
    """A connection to the template that fits, started where there is none. Raises OSError."""
    path = home.warm_socket.with_name(f"warm-{template_key(launch)}.sock")
    started = False
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_address(path) as address:
                connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        if time.monotonic() > deadline:
            raise TimeoutError("the template did not start")
        if not started:
            started = True
            _retire_others(path)
            _start(home, path, launch)
        else:
            time.sleep(0.02)


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """The address of a unix socket, which may have about 100 bytes only: through its folder where longer."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _start(home: Home, path: Path, launch: Launch) -> None:
    env = {name: value for name, value in launch.env.items() if name == "PATH"} | _relevant(launch.env)
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with _log(home).open("ab") as log:
        process = subprocess.Popen(
            [launch.argv[0], "-P", "-m", "swift.experiments.warm", "--socket", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home.root,
            env=env,
            start_new_session=True,
        )
    if process.wait(DEADLINE_SECONDS):
        raise OSError(f"the template failed, see {_log(home)}")


def _retire_others(path: Path) -> None:
    """Make room: ask templates of other environments to leave when there are too many."""
    others = [other for other in path.parent.glob("warm-*.sock") if other != path]
    for other in others if len(others) >= MAX_TEMPLATES else ():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            with short_address(other) as address:
                connection.connect(address)
            connection.sendall(b'{"retire": true}\n')


# The template


class Template:
    """Listens, forks, and leaves when it is no longer wanted. `serve` returns once, in every process there is.

    Args:
        path: of the socket; files of the same stem beside it belong to the template.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models_file = path.with_name("warm-models.txt")
        self.lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._take_lock()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        with short_address(path) as address:
            self.listener.bind(address)
        os.umask(mask)
        self.listener.listen(64)
        self.owner: ProcessIdentity | None = None
        self.num_forks = 0

    def _take_lock(self) -> None:
        """Raises BlockingIOError when such a template is there; one that is leaving has unlinked its socket."""
        deadline = time.monotonic() + LEAVING_SECONDS
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self.path.exists() or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def load(self) -> None:
        """Import what jobs import; afterwards there must be one thread and no device."""
        from swift.core.logging import quiet_libraries

        gc.disable()
        quiet_libraries()
        for name in PRELOADED:
            importlib.import_module(name)
        _fill_caches()
        self._load_models()
        self._check()

    def _load_models(self) -> None:
        """Modules of architectures that recent jobs used."""
        try:
            names = self.models_file.read_text().split()
        except FileNotFoundError:
            return
        for name in names:
            if name not in sys.modules:
                with contextlib.suppress(ImportError):  # of an older transformers
                    importlib.import_module(name)

    def _check(self) -> None:
        import torch

        threads = len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 1
        assert max(threads, threading.active_count()) == 1, "a thread was started, forks would not be safe"
        assert not torch.cuda.is_initialized(), "a device was touched, forks could not use it"
        assert not (files := self._open_files()), f"files are open, forks would close them: {files}"
        gc.collect()
        gc.freeze()

    def _open_files(self) -> list[str]:
        """What is open besides input, output, our socket and our lock, and the connection in hand."""
        folder = Path("/proc/self/fd")
        if not folder.is_dir():
            return []
        found = []
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing itself
                if int(entry.name) > 2 and int(entry.name) != self.lock:
                    found.append(str(entry.readlink()))
        return [name for name in found if not name.startswith("socket:")]

    def serve(self) -> Callable[[], NoReturn] | None:
        """Answer until it is time to leave: None. In a forked supervisor: what it has to do."""
        idle_since = time.monotonic()
        while True:
            if select.select([self.listener], [], [], LOOK_SECONDS)[0]:
                idle_since = time.monotonic()
                connection, _ = self.listener.accept()
                with connection:
                    leave, work = self._answer(connection)
                if work is not None:
                    return work
                if leave:
                    return None
            elif time.monotonic() - idle_since > IDLE_SECONDS or not (self.owner and self.owner.is_alive()):
                return None

    def _answer(self, connection: socket.socket) -> tuple[bool, Callable[[], NoReturn] | None]:
        """Handle one request: (leave, work of the fork)."""
        connection.settimeout(5.0)
        try:
            wish = json.loads(connection.makefile("rb").readline() or b"{}")
        except OSError as error:
            print(f"request: {error}", file=sys.stderr, flush=True)
            return False, None
        if "owner" in wish:
            self.owner = ProcessIdentity(**wish["owner"])
        if "attempt" not in wish:
            return bool(wish.get("retire")), None
        self._load_models()
        self._check()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            # Once more, so that the supervisor is nobody's child and the template has nothing to wait for.
            os.setsid()
            if os.fork():
                os._exit(0)
            answer = connection.dup()
            self.listener.close()
            os.close(self.lock)
            return False, lambda: self._supervise(Path(wish["attempt"]), wish["umask"], answer)
        os.waitpid(child, 0)
        self.num_forks += 1
        return self.num_forks >= MAX_FORKS or psutil.Process().memory_info().rss > MAX_BYTES, None

    def _supervise(self, attempt: Path, umask: int, answer: socket.socket) -> NoReturn:
        os.setsid()
        gc.enable()

        def ready() -> None:
            with contextlib.suppress(OSError):  # whoever asked has gone; the job goes on
                answer.sendall(b"{}\n")
            answer.close()

        log = os.open(attempt / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        run = lambda launch: run_job(launch, umask, self.models_file)  # noqa: E731
        code = Supervisor(attempt, run, note="warm").run(ready)
        if code == EXIT_LOCKED:
            answer.sendall(b'{"refused": "the job was taken"}\n')
        os._exit(code)  # destroying the template's objects would only copy their pages

    def close(self) -> None:
        """Unlink the socket, then let the lock go: a successor makes its own."""
        self.path.unlink(missing_ok=True)
        self.listener.close()
        os.close(self.lock)


def _fill_caches() -> None:
    """Tables that libraries compute at their first use, the same for every job."""
    from PIL import Image
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    Image.preinit()  # the picture formats matplotlib asks for
    get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns for all architectures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m swift.experiments.warm")
    parser.add_argument("--socket", type=Path, required=True)
    options = parser.parse_args(argv)
    ready = detach()
    try:
        template = Template(options.socket)
    except BlockingIOError:
        ready()
        return 0
    ready()
    work: Callable[[], NoReturn] | None = None
    try:
        template.load()
        work = template.serve()
    finally:
        if work is None:
            template.close()
    if work is not None:
        work()
    return 0


if __name__ == "__main__":
    sys.exit(main())
