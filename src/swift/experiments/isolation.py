"""The environment of one job: its own devices, port, temporary and cache folders, and number of threads."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from swift.core.errors import SwiftError
from swift.experiments.inventory import VISIBLE_VARIABLES, visible_devices
from swift.experiments.types import Placement

__all__ = ["as_submitted", "environment_for", "free_port", "from_shell"]

_FROM_SHELL = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "USE_HF", "MODELSCOPE_", "WANDB_", "SWANLAB_", "MLFLOW_", "COMET_",
    "NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "TORCH", "PYTORCH_", "XDG_CACHE_HOME", "PYTHONPATH", "LD_LIBRARY_PATH",
    "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
"""Beginnings of the names of variables that jobs take from the shell they were submitted from."""
_PROXY = "_proxy"
_PLACED = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TORCHELASTIC_")
"""Exceptions: what the placement decides, and what a launcher leaves to its ranks."""

_THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
}
"""Compilers write here; two jobs in one folder have been seen to read each other's half-written files."""
_OF_A_PARENT = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "OMP_THREAD_LIMIT",
)  # fmt: skip
"""Left by a launcher that the service was started under: a job must not believe to be one of its ranks."""


def from_shell(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of the submitting shell that its jobs shall see: accounts, caches, proxies, libraries."""
    return {
        name: value
        for name, value in env.items()
        if (name.startswith(_FROM_SHELL) and not name.startswith(_PLACED)) or name.lower().endswith(_PROXY)
    }


def as_submitted(service_env: Mapping[str, str], shell: Mapping[str, str] | None) -> dict[str, str]:
    """The service's environment with those variables as the submitting shell had them, the missing ones too.

    ``shell`` None: nothing was recorded at submit, so the service's hold.
    """
    if shell is None:
        return dict(service_env)
    return {**{name: service_env[name] for name in service_env.keys() - from_shell(service_env)}, **shell}


def environment_for(placement: Placement, base_env: Mapping[str, str], job_dir: Path) -> dict[str, str]:
    """The complete environment of a job's processes; its folders below ``job_dir`` are made.

    The numbers of the placement are those of the machine, not positions in the list of a parent that sees only some
    devices. Raises SwiftError when ``base_env`` hides a device of the placement.
    """
    env = {name: value for name, value in base_env.items() if name not in _OF_A_PARENT}
    _set_devices(env, placement, base_env)
    env["MASTER_ADDR"] = "127.0.0.1"
    env["MASTER_PORT"] = str(free_port())
    temporary = job_dir / "tmp"
    folders = {name: job_dir / "cache" / folder for name, folder in _CACHES.items()}
    for name, folder in {**folders, "TMPDIR": temporary}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SwiftError(
                "a folder of the job cannot be made",
                where=str(folder),
                why=error.strerror,
                fix="free space or set SWIFT_HOME to a writable disk",
            ) from error
        env[name] = str(folder)
    for name in _THREADS:
        env[name] = str(placement.threads)
    return env


def _set_devices(env: dict[str, str], placement: Placement, base_env: Mapping[str, str]) -> None:
    allowed = visible_devices(placement.kind, base_env)
    indices = [str(index) for index in placement.devices]
    hidden = [index for index in indices if allowed is not None and index not in allowed]
    # Names such as GPU-5a3c were resolved by the inventory; only plain numbers can be compared here.
    if hidden and allowed is not None and all(entry.isdigit() for entry in allowed):
        variable = VISIBLE_VARIABLES[placement.kind]
        raise SwiftError(
            f"{placement.kind}:{', '.join(hidden)} is hidden from the job",
            where=f"{variable}={base_env[variable]}",
            fix=f"start the service with the same {variable}, or unset it",
        )
    for kind, variable in VISIBLE_VARIABLES.items():
        if kind == placement.kind:
            env[variable] = ",".join(indices)
        elif placement.kind == "cpu" and kind != "xpu":
            # A job without accelerators must not open one that belongs to another. Intel's mask has no "none".
            env[variable] = "-1" if kind == "rocm" else ""
    if placement.kind == "cuda":
        env["CUDA_DEVICE_ORDER"] = (
            "PCI_BUS_ID"  # the driver library counts so; CUDA by itself puts fast ones first
        )
    elif placement.kind == "rocm":
        env.pop("CUDA_VISIBLE_DEVICES", None)  # HIP reads it, too, and would apply both


def free_port() -> int:
    """A TCP port that was free a moment ago, on this machine's own address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
