"""Whether what is installed is still what was tested, and still works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.core.files import atomic_write_json
from swift.toolchains.install import SMOKE_FOLDER, installed_versions, smoke_test
from swift.toolchains.lock import FOLDER, read_lock, toolchain_names, toolchain_purpose
from swift.toolchains.toolchain import RECORD, ToolchainError, find_toolchain, toolchain_folder

__all__ = ["examine_toolchain", "list_toolchains"]


def list_toolchains() -> list[dict[str, Any]]:
    """Every toolchain: ``name, for, version, variant, disk_bytes, installed, problem``; version None: not installed."""
    from swift.core.devices import nvidia_memory

    here = "cuda" if nvidia_memory() else "cpu"
    rows = []
    for name in toolchain_names():
        row: dict[str, Any] = {"name": name, "for": toolchain_purpose(name), "problem": None}
        try:
            record = find_toolchain(name).record
            row |= {key: record[key] for key in ("variant", "disk_bytes", "installed")}
            row["version"] = record["versions"].get(name)
        except ToolchainError as error:
            if (toolchain_folder(name) / RECORD).exists():
                row["problem"] = error.why
            size = read_lock(name, here).disk_bytes
            row |= {"version": None, "variant": here, "disk_bytes": size, "installed": None}
        rows.append(row)
    return rows


def examine_toolchain(name: str, locks: Path = FOLDER, smoke: Path = SMOKE_FOLDER) -> dict[str, Any]:
    """``problems``, ``notes`` and the smoke test's result (None when it failed), which is recorded too."""
    problems: list[str] = []
    notes: list[str] = []
    try:
        toolchain = find_toolchain(name)
    except ToolchainError as error:
        return {"problems": [str(error)], "notes": [], "smoke": None}
    recorded, present = toolchain.versions, installed_versions(toolchain.environment)
    for package in sorted(recorded.keys() | present.keys()):
        if recorded.get(package) != present.get(package):
            was, now = recorded.get(package, "not there"), present.get(package, "gone")
            problems.append(f"{package} was {was} when it was tested, and is {now}")
    if read_lock(name, toolchain.variant, locks).digest != toolchain.record["lock"]:
        notes.append(f"this version of swift has another lock: swift toolchain install {name}")
    if not toolchain.record["tested_by_us"]:
        notes.append("its versions come from public metadata; the makers of swift have not run them")
    if toolchain.record["arguments"]:
        notes.append(f"installed with further options of pip: {' '.join(toolchain.record['arguments'])}")
    result = None
    try:
        result = smoke_test(toolchain, smoke)
        atomic_write_json(toolchain_folder(name) / RECORD, {**toolchain.record, "smoke": result})
    except ToolchainError as error:
        problems.append(str(error))
    return {"problems": problems, "notes": notes, "smoke": result}
