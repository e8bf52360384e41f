"""Wheels, locks and smoke tests made on the spot: installing them asks no network and takes about a second."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import zipfile
from pathlib import Path

from swift.toolchains.install import Installation
from swift.toolchains.toolchain import Toolchain

GOOD = "import fakelib\ndef main(payload):\n    return {'doubled': fakelib.double(21)}\n"


def make_wheel(folder: Path, name: str, version: str, code: str) -> Path:
    """A wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text)}")
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(inner, text)
    return path


class Place:
    """A home with locks, smoke tests and wheels for the toolchain ``lm-eval``, and a quick stand-in for uv."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wheels, self.locks, self.smoke = root / "wheels", root / "locks", root / "smoke"
        self.lines: list[str] = []
        if self.wheels.exists():  # another process has made it
            return
        for folder in (self.wheels, self.locks, self.smoke, root / "bin"):
            folder.mkdir()
        program = f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).with_name("fake_uv.py")} "$@"\n'
        (root / "bin" / "uv").write_text(program)
        (root / "bin" / "uv").chmod(0o755)
        make_wheel(self.wheels, "fakelib", "1.0", "def double(x):\n    return 2 * x\n")
        self.write_lock("fakelib==1.0")
        self.write_smoke(GOOD)

    def write_lock(self, pins: str, head: str = "", step: str = "all") -> None:
        text = f"#: python 3.11\n#: tested yes\n#: disk 0.001\n{head}#: step {step}\n{pins}\n"
        (self.locks / "lm-eval-cpu.txt").write_text(text)

    def write_smoke(self, code: str) -> None:
        (self.smoke / "lm_eval.py").write_text(code)

    def wanted(self, **changes: object) -> Installation:
        settings: dict = {
            "name": "lm-eval",
            "variant": "cpu",
            "wheels": self.wheels,
            "installer": "uv",
            "locks": self.locks,
            "smoke": self.smoke,
            "say": self.lines.append,
            **changes,
        }
        return Installation(**settings)

    @property
    def folder(self) -> Path:
        return self.root / "home" / "toolchains" / "lm-eval"

    def environments(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("env-*"))


def bare_toolchain(root: Path) -> Toolchain:
    """A toolchain whose environment is this test's own Python: nothing to install."""
    environment = root / "toolchains" / "vllm" / "env-test"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    record = {
        "environment": "env-test",
        "variant": "cpu",
        "versions": {"vllm": "0.1"},
        "variables": {"OF_LOCK": "1"},
    }
    (environment.parent / "toolchain.json").write_text(json.dumps(record))
    return Toolchain("vllm", environment, record)


def exists(pid: int) -> bool:
    """Whether a process lives, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
