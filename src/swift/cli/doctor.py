"""``swift doctor [--json]``: devices, versions, what is installed and what is missing for what.

Nothing here may hang or crash on a broken installation, since that is what it is for: libraries are looked up by
their metadata, and those that may fail to load are imported in a child process with a deadline.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swift.core.errors import UsageError
from swift.core.format import format_bytes

__all__ = ["examine", "extra_of", "import_probe", "other_owners", "run", "thread_warning"]

USAGE = "usage: swift doctor [--json]\n\nReport devices, versions and what is missing for what. Exit 1 on problems."
CORE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "pyarrow",
    "rich",
    "matplotlib",
)
OPTIONAL = {
    "flash-attn": "fast attention on CUDA (--attn_impl flash_attention_2)",
    "liger-kernel": "fused kernels on CUDA (--use_liger_kernel)",
    "tensorboard": "--report_to tensorboard",
    "wandb": "--report_to wandb",
    "swanlab": "--report_to swanlab",
    "trackio": "--report_to trackio",
    "mlflow": "--report_to mlflow",
    "optuna": "sweeps with method tpe or early stopping",
    "modelscope-hub": "models and data from ModelScope",
    "bitsandbytes": "QLoRA (--quant_method bnb), 8-bit and paged optimizers",
    "torchao": "8-bit weights (--quant_method torchao)",
    "schedulefree": "--optim schedule_free_adamw",
    "peft": "DoRA, AdaLoRA, VeRA, OFT, BOFT, IA3, LoHa, LoKr, FourierFT, Bone; LoRA on fused experts",
    "llguidance": "answers of a given form from the server (JSON, regular expressions, grammars, required tool calls)",
    "math-verify": "--metric math",
    "sacrebleu": "--metric bleu, chrf",
    "jsonschema-rs": "--reward_funcs json_schema",
}
"""Distribution -> what it is good for."""
INSTALL = {"flash-attn": "pip install flash-attn --no-build-isolation"}
CUDA_EXTRA = ("liger-kernel",)
FEW_FILES = 1024
LITTLE_DISK_BYTES = 5 << 30
PROBE_SECONDS = 60.0
SWIFT_OWNERS = ("swift-forge",)

_DEVICE_PROGRAM = (
    "import json; from swift.core.devices import describe_devices; print(json.dumps(describe_devices()))"
)


def run(argv: list[str]) -> int:
    """Print the report; 0 when nothing is wrong, 1 when there are problems."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    unknown = [word for word in argv if word != "--json"]
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}", fix="swift doctor [--json]")
    report = examine()
    if "--json" in argv:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(report)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """The whole report as plain values. ``problems`` will hinder a run; ``warnings`` may slow one down."""
    from swift.core.devices import cpu_count, describe_cpu

    problems: list[str] = []
    warnings: list[str] = []
    devices = _devices(problems)
    versions = {name: _version(name) for name in ("swift-forge", *CORE)}
    problems += [
        f"{name} is not installed: pip install swift-forge" for name in CORE if versions[name] is None
    ]
    problems += [
        f"the distribution {name} also provides a module called swift, and one hides the other:"
        f" pip uninstall {name}, or use an environment without it"
        for name in other_owners()
    ]
    if importlib.util.find_spec("torchvision") is not None:
        fault = import_probe("torchvision")
        if fault:
            problems.append(
                f"torchvision is installed but cannot be imported ({fault}); transformers fails with it:"
                " pip uninstall torchvision, or install the one built for this torch"
            )
    warnings += _mixed_devices(devices) + _limits()
    threads = thread_warning(os.environ.get("OMP_NUM_THREADS"), cpu_count())
    if threads:
        warnings.append(threads)
    nvidia = _nvidia()
    if nvidia and nvidia["devices"] and not any(device["kind"] == "cuda" for device in devices):
        problems.append(
            f"there is an NVIDIA device, but torch {versions['torch']} cannot use it:"
            " install a CUDA build of torch that fits the driver"
        )
    return {
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "versions": versions,
        "cpu": describe_cpu(),
        "devices": [device for device in devices if device["kind"] != "cpu"],
        "nvidia": nvidia,
        "disk": {"path": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "optional": {name: {"version": _version(name), "for": use} for name, use in OPTIONAL.items()},
        "toolchains": _toolchains(problems),
        "problems": problems,
        "warnings": warnings,
    }


def _toolchains(problems: list[str]) -> list[dict[str, Any]]:
    """What ``swift toolchain ls`` knows; broken ones are problems."""
    from swift.toolchains.check import list_toolchains

    rows = list_toolchains()
    problems += [
        f"the toolchain {row['name']} is broken ({row['problem']}): swift toolchain rm {row['name']}"
        for row in rows
        if row["problem"]
    ]
    return rows


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def other_owners(owners: Callable[[], Any] = importlib.metadata.packages_distributions) -> list[str]:
    """Distributions besides ours that provide a top-level module called ``swift`` (ms-swift, OpenStack's swift)."""
    found: Iterable[str] = owners().get("swift", [])
    return sorted({name for name in found if name.lower().replace("_", "-") not in SWIFT_OWNERS})


def import_probe(module: str, *, seconds: float = PROBE_SECONDS) -> str | None:
    """Import ``module`` in a child process; None when that works, else the last line of what went wrong."""
    try:
        _child(f"import {module}", seconds)
    except subprocess.TimeoutExpired:
        return f"no answer after {seconds:g} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    return None


def _child(program: str, seconds: float) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    """What torch sees, asked in a child process: a broken driver may hang or crash whoever asks."""
    try:
        devices: list[dict[str, Any]] = json.loads(_child(_DEVICE_PROGRAM, PROBE_SECONDS).splitlines()[-1])
        return devices
    except subprocess.TimeoutExpired:
        problems.append(
            f"torch did not list the devices within {PROBE_SECONDS:g} s: look at the driver (nvidia-smi)"
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        problems.append(f"torch cannot be used: {lines[-1] if lines else error}")
    except (ValueError, IndexError) as error:
        problems.append(f"torch did not list the devices: {error}")
    return []


def _mixed_devices(devices: list[dict[str, Any]]) -> list[str]:
    """Devices of one kind that differ: the smallest decides what fits, the slowest how fast it goes."""
    found = []
    for kind in sorted({device["kind"] for device in devices}):
        names = {device["name"] for device in devices if device["kind"] == kind}
        if len(names) > 1:
            found.append(
                f"{kind} devices differ ({', '.join(sorted(names))}): choose alike ones, e.g. CUDA_VISIBLE_DEVICES=0"
            )
    return found


def _limits() -> list[str]:
    found = []
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < FEW_FILES:
            found.append(f"only {soft} files may be open at once, data loaders need more: ulimit -n 65536")
    except ImportError:
        pass  # no such limit on this system
    free = shutil.disk_usage(Path.cwd()).free
    if free < LITTLE_DISK_BYTES:
        found.append(f"{format_bytes(free)} free on the disk of {Path.cwd()}: checkpoints may not fit")
    return found


def thread_warning(setting: str | None, cores: int) -> str | None:
    """What is wrong with OMP_NUM_THREADS, or None."""
    if setting is None:
        return None
    first = setting.split(",")[0].strip()
    if not first.isdigit() or int(first) == 0:
        return f"OMP_NUM_THREADS={setting!r} is not a number of threads"
    if int(first) > cores:
        return f"OMP_NUM_THREADS={first} on {cores} cores: more threads than cores slow each other down"
    return None


def _nvidia() -> dict[str, Any] | None:
    """Driver and NVLink topology by nvidia-ml-py; None where that, or a device, is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "devices": [
                {
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "nvlinks": _active_links(pynvml, handle),
                }
                for handle in handles
            ],
            "topology": [[_connection(pynvml, one, other) for other in handles] for one in handles],
        }
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _active_links(pynvml: Any, handle: Any) -> int:
    count = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            count += int(pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED)
        except pynvml.NVMLError:  # there is no such link on this device
            break
    return count


def _connection(pynvml: Any, one: Any, other: Any) -> str:
    """``NVLink``, or how far apart two devices are on the PCI bus."""
    if one == other:
        return "-"
    try:
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == pynvml.NVML_P2P_STATUS_OK:
            return "NVLink"
        level = pynvml.nvmlDeviceGetTopologyCommonAncestor(one, other)
    except pynvml.NVMLError:
        return "?"
    near = {
        pynvml.NVML_TOPOLOGY_INTERNAL: "same board",
        pynvml.NVML_TOPOLOGY_SINGLE: "one switch",
        pynvml.NVML_TOPOLOGY_MULTIPLE: "switches",
        pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "host bridge",
        pynvml.NVML_TOPOLOGY_NODE: "same node",
    }
    return near.get(level, "across nodes")


def _print(report: dict[str, Any]) -> None:
    cpu, versions = report["cpu"], report["versions"]
    print(
        f"swift-forge {versions['swift-forge']}, Python {report['python']['version']}, {report['python']['platform']}"
    )
    print(
        "versions   " + ", ".join(f"{name} {version}" for name, version in versions.items() if name in CORE)
    )
    features = ", ".join(cpu["features"]) or "no vector extensions known"
    print(
        f"cpu        {cpu['name']}, {cpu['cores']} cores, {format_bytes(cpu['memory_bytes'])} memory, {features}"
    )
    for device in report["devices"]:
        half = "bfloat16" if device["bfloat16"] else "no bfloat16"
        print(
            f"device     {device['kind']}:{device['index']} {device['name']},"
            f" {format_bytes(device['memory_bytes'])}, {half}"
        )
    if not report["devices"]:
        print("device     no accelerator: training runs on the CPU")
    if report["nvidia"]:
        print(f"driver     {report['nvidia']['driver']}")
        for index, row in enumerate(report["nvidia"]["topology"]):
            links = report["nvidia"]["devices"][index]["nvlinks"]
            print(f"links      cuda:{index} {links} NVLinks; to the others: {', '.join(row)}")
    print(f"disk       {format_bytes(report['disk']['free_bytes'])} free in {report['disk']['path']}")
    there = [f"{name} {entry['version']}" for name, entry in report["optional"].items() if entry["version"]]
    print(f"installed  {', '.join(there) or 'no optional package'}")
    for name, entry in report["optional"].items():
        if entry["version"] is None:
            print(f"missing    {name}, for {entry['for']}: {_how(name)}")
    for row in report["toolchains"]:
        state = (
            f"{row['version']} ({row['variant']})"
            if row["version"]
            else f"swift toolchain install {row['name']}"
        )
        print(f"toolchain  {row['name']}, for {row['for']}: {state}")
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("no problems found")


def extra_of(name: str) -> str:
    """The extra of swift-forge that brings a distribution."""
    return {
        **dict.fromkeys(CUDA_EXTRA, "cuda"),
        "optuna": "sweep",
        "modelscope-hub": "modelscope",
        "peft": "tuners",
        "llguidance": "serve",
        "math-verify": "eval",
        "sacrebleu": "eval",
        "jsonschema-rs": "eval",
        "bitsandbytes": "bnb",
        "schedulefree": "optim",
    }.get(name, name)


def _how(name: str) -> str:
    return INSTALL.get(name, f"pip install 'swift-forge[{extra_of(name)}]'")
