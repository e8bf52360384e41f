"""What a run writes down about itself: configuration, provenance, environment, summary.

Secrets stay out: environment variables come from a list of harmless names, and whatever looks like a secret
(an option or a variable called token, key, password...) is replaced by ``***`` wherever it would be recorded.
"""

from __future__ import annotations

import datetime
import functools
import getpass
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.core.files import atomic_write_json
from swift.runs.metrics import finite

if TYPE_CHECKING:
    from swift.config.schema import Resolved

__all__ = [
    "code_version",
    "data_fingerprint",
    "installed_versions",
    "model_fingerprint",
    "redact_arguments",
    "write_environment",
    "write_provenance",
    "write_summary",
]

PACKAGES = (
    "swift-forge",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "pyarrow",
    "peft",
    "accelerate",
    "triton",
    "flash-attn",
    "liger-kernel",
)
"""Distributions whose version can change a result."""

_VARIABLE = re.compile(
    r"(OMP|MKL|OPENBLAS|KMP|GOMP|CUDA|NCCL|GLOO|TORCH|PYTORCH|TRITON|HF|TRANSFORMERS|TOKENIZERS|SLURM|SWIFT)_\w+"
    r"|CUBLAS_WORKSPACE_CONFIG|PYTHONHASHSEED|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|ASCEND_\w+|CONDA_PREFIX"
)
_SECRET = re.compile(r"(^|_)token$|secret|passw|api_?key|_key$|credential|auth$", re.IGNORECASE)
_WHOLE_FILE_BYTES = 1 << 30
_PART_BYTES = 1 << 26


def write_provenance(
    folder: Path,
    resolved: Resolved,
    *,
    arguments: Sequence[str] | None = None,
    data_files: Iterable[Path] = (),
    model_path: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """``provenance.json``: who started what, from which code, weights and data.

    Args:
        arguments: the command line; default ``sys.argv``.
        data_files: every file that was read for training or validation.
        model_path: the model's folder.
        extra: more facts worth keeping (the template's fingerprint, the checkpoint a run goes on from).
    """
    record = {
        "command": resolved.command,
        "command_line": redact_arguments(sys.argv if arguments is None else arguments),
        "working_directory": str(Path.cwd()),
        "user": _user(),
        "host": platform.node(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "code": _git_state(Path(__file__).parent),
        "seed": resolved.config.training.seed,
        "data": [data_fingerprint(path) for path in data_files],
        "model": model_fingerprint(model_path) if model_path else None,
        "sources": {
            name: str(source) for name, source in resolved.sources.items() if source.kind != "default"
        },
        **(extra or {}),
    }
    atomic_write_json(folder / "provenance.json", record)


def write_environment(folder: Path, devices: list[dict[str, Any]]) -> None:
    """``env.json``: the machine as the run sees it. ``devices`` as ``core.devices.describe_devices`` gives them."""
    variables = {
        name: "***" if _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLE.fullmatch(name)
    }
    record = {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": installed_versions(),
        "devices": devices,
        "variables": variables,
    }
    atomic_write_json(folder / "env.json", record)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json``: the results of a run that has ended. NaN becomes null, as in the metrics."""
    atomic_write_json(folder / "summary.json", finite(summary))


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Distribution -> version, of those that are installed. Imports none of them."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the values of options that look like secrets (``--hub_token X``)."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = argument.startswith("--") and bool(_SECRET.search(name.replace("-", "_")))
        if hide_next and not argument.startswith("--"):
            shown.append("***")
        else:
            shown.append(f"{name}=***" if secret and equals else argument)
        hide_next = secret and not equals
    return shown


def data_fingerprint(path: Path) -> dict[str, Any]:
    """Path, bytes and SHA-256 of a file; above 1 GiB the hash is over its first and last 64 MiB (and says so)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            return {
                "path": str(path),
                "bytes": size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
        digest = hashlib.sha256(file.read(_PART_BYTES))
        file.seek(size - _PART_BYTES)
        digest.update(file.read(_PART_BYTES))
    return {"path": str(path), "bytes": size, "sha256_first_and_last_64_mib": digest.hexdigest()}


def model_fingerprint(path: Path) -> dict[str, Any]:
    """Path, SHA-256 of config.json, and name and bytes of each weight file (hashing weights would take minutes)."""
    config = path / "config.json"
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return {
        "path": str(path),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": {file.name: file.stat().st_size for file in weights},
    }


@functools.cache
def code_version() -> str:
    """Version of this package, in a checkout with its commit: ``0.1.0+437770b6b1d2`` (``.modified``: files differ)."""
    state = _git_state(Path(__file__).parent)
    version = installed_versions(["swift-forge"]).get("swift-forge", "unknown")
    if not state:
        return version
    return f"{version}+{state['commit'][:12]}" + (".modified" if state["modified"] else "")


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return None


def _git_state(inside: Path) -> dict[str, Any]:
    """Commit of the checkout this package runs from, and whether files differ from it; empty when installed."""
    root = next((parent for parent in inside.parents if (parent / "pyproject.toml").is_file()), None)
    if root is None or not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git here, or not our checkout to read
        return {}
    return {"commit": commit, "modified": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
