"""Runs one program with as few rights as the machine lets us take away. A script of its own: no swift is imported.

``python -I sandbox_child.py SETTINGS`` with SETTINGS a JSON object (see `swift.evaluate.sandbox`). One line of JSON on
the descriptor it is given says which walls stand; then the program runs, and the exit code is its own.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

_NEW_MOUNT, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_READ_ONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
_PLACE = "/tmp"
_WORK = "/tmp/work"

libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def try_to(walls: list[str], name: str, action: Callable[[], None]) -> bool:
    """Do it and note it; what this machine does not allow is not noted."""
    try:
        action()
    except (OSError, AttributeError):
        return False
    walls.append(name)
    return True


def enter_namespaces() -> None:
    """Own processes, own network without any device, own mounts; root needs no user namespace for it."""
    spaces = _NEW_MOUNT | _NEW_PID | _NEW_NET | _NEW_IPC
    if libc.unshare(spaces) == 0:
        return
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(spaces | _NEW_USER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def protect_files(folder: str, megabytes: int) -> None:
    """Everything read-only but ``/tmp``, which becomes a memory disk of its own and goes with the namespace."""
    check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    options = f"size={megabytes}m,nr_inodes=2000,mode=777".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options))
    os.mkdir(os.path.join(folder, "work"))
    os.chmod(os.path.join(folder, "work"), 0o777)
    show_library(folder)
    check(libc.mount(folder.encode(), _PLACE.encode(), None, _MS_MOVE, None))
    for path, flags, attributes in (
        (b"/", _AT_RECURSIVE, MountAttributes(_READ_ONLY, 0, 0, 0)),
        (_PLACE.encode(), 0, MountAttributes(0, _READ_ONLY, 0, 0)),
    ):
        size = ctypes.sizeof(attributes)
        check(libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path, flags, ctypes.byref(attributes), size))
    os.environ["HOME"] = _WORK


def show_library(folder: str) -> None:
    """Python's own files under a path that everybody can walk: one below /root is closed to other users."""
    places = {}
    for number, path in enumerate(filter(os.path.isdir, sys.path)):
        inside = os.path.join(folder, f"library{number}")
        os.mkdir(inside)
        check(libc.mount(path.encode(), inside.encode(), None, _MS_BIND, None))
        places[path] = os.path.join(_PLACE, f"library{number}")
    sys.path[:] = places.values()
    for module in list(
        sys.modules.values()
    ):  # packages loaded already look for their parts where they come from
        if getattr(module, "__path__", None):
            base, name = os.path.split(module.__path__[0])
            module.__path__ = [os.path.join(places.get(base, base), name)]


def hide_processes() -> None:
    """A /proc of this namespace alone (command lines outside may hold keys); an empty one where that is forbidden.

    To be called by the namespace's first process.
    """
    check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    flags = _MS_READ_ONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if libc.mount(b"proc", b"/proc", b"proc", flags, None) != 0:
        check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", flags, None))


def limit(settings: dict[str, Any]) -> None:
    seconds, size = int(settings["cpu_seconds"]), int(settings["memory_mb"]) << 20
    limits = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": size,
        "RLIMIT_FSIZE": int(settings["file_mb"]) << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": int(settings["processes"]),
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def drop_root() -> None:
    """Limits on processes do not hold for root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def follow(child: int) -> None:
    """In the parent: wait for the child and end as it did. Returns in the child."""
    if child == 0:
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number = -code if code < 0 else code - 128
    if number > 0 and os.getpid() != 1:  # the first process of a namespace cannot kill itself
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number if code < 0 else code)


def main() -> None:
    settings = json.loads(sys.argv[1])
    report = settings["report_fd"]
    walls: list[str] = []
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with open(settings["program"], encoding="utf-8") as file:
        code = file.read()
    folder = settings["folder"]
    if settings["namespaces"] and try_to(walls, "network, processes", enter_namespaces):
        if try_to(walls, "files", lambda: protect_files(folder, settings["file_mb"])):
            folder = _WORK
        follow(os.fork())
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # This is the first process of the new namespace: when it ends, all others in it do. The program is its child,
        # so that it can neither stop it nor outlive it.
        try_to(walls, "sight of processes", hide_processes)
        follow(os.fork())
    os.chdir(folder)
    limit(settings)
    was_root = os.getuid() == 0
    if was_root:
        try_to(walls, "root", drop_root)
    os.write(
        report, json.dumps(walls).encode() + b"\n"
    )  # it stays open: whoever reads it sees when all have ended
    sys.argv[1:] = []
    if was_root and "root" not in walls:
        sys.exit(90)
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(code, "program.py", "exec"), names)


with contextlib.suppress(BrokenPipeError):
    main()
