"""What a warm worker does after the fork: become as a new process would be, run one command, and end."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

from swift.core.files import atomic_write_text
from swift.experiments.types import Launch

__all__ = ["REMEMBERED_MODELS", "is_model", "run_job"]

REMEMBERED_MODELS = 8
"""Model modules that a template imports in advance: those its jobs needed last."""


def run_job(launch: Launch, umask: int, models_file: Path) -> NoReturn:
    """Become as a new ``python -m swift WORDS`` would be, run the command, and end this process."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    before = set(sys.modules)
    code: int | str | None = 1
    try:
        _become(launch, umask)
        # By name, as `python -m` does it: nothing here depends on what a command line means.
        code = importlib.import_module("swift.cli.main").main(launch.argv[3:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    except BaseException:  # the interpreter's own last resort, which we stand in for
        traceback.print_exc()
    _remember_models(before, models_file)
    _end(int(code or 0))


def _become(launch: Launch, umask: int) -> None:
    os.environ.clear()
    os.environ.update(launch.env)
    time.tzset()
    os.umask(umask)
    os.chdir(launch.cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python has them
        signal.signal(number, signal.SIG_IGN)
    spec = importlib.util.find_spec("swift.__main__")
    assert spec is not None and spec.origin is not None
    # Processes the job spawns look at its main module to find out what to import.
    module = types.ModuleType("__main__")
    module.__spec__, module.__file__ = spec, spec.origin
    sys.modules["__main__"] = module
    sys.argv[:] = [spec.origin, *launch.argv[3:]]
    if "PYTHONSAFEPATH" not in launch.env:
        sys.path.insert(0, launch.cwd)  # the template was started with -P
    importlib.invalidate_caches()
    import numpy
    import torch

    numpy.random.seed()  # the random module does this by itself, torch starts from a fixed seed
    torch.set_num_threads(int(launch.env.get("OMP_NUM_THREADS") or launch.threads))
    gc.enable()


def _remember_models(before: set[str], models_file: Path) -> None:
    """Leave the names of model modules that had to be imported to the template."""
    new = sorted(name for name in sys.modules.keys() - before if is_model(name))
    if not new:
        return
    try:
        known = models_file.read_text().split()
    except FileNotFoundError:
        known = []
    names = [*new, *(name for name in known if name not in new)][: 4 * REMEMBERED_MODELS]
    with contextlib.suppress(OSError):  # it only saves time
        atomic_write_text(models_file, "\n".join(names) + "\n", durable=False)


def is_model(name: str) -> bool:
    return name.startswith("transformers.models.") and name.rpartition(".")[2].startswith(
        ("modeling_", "configuration_")
    )


def _end(code: int) -> NoReturn:
    """What the interpreter does at its end, less the destruction of every object."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
