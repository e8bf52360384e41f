"""What the measurements share: children with their CPU time and memory, steady-state rates, result files."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "swift-forge")


@dataclasses.dataclass(frozen=True)
class Mark:
    """The state of a process after an optimizer step: CPU seconds since its start, non-pad tokens so far."""

    step: int
    cpu_seconds: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Child:
    """What one measured process used: CPU seconds (user + system, with its own children) and peak memory."""

    cpu_seconds: float
    peak_rss_bytes: int


def described_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def write_mark(folder: Path, step: int, num_tokens: int) -> None:
    """Append what `read_marks` reads to ``folder/marks.jsonl``."""
    with (folder / "marks.jsonl").open("a") as file:
        file.write(json.dumps(dataclasses.asdict(Mark(step, cpu_seconds(), num_tokens))) + "\n")


def one_thread() -> dict[str, str]:
    """The environment of a measured process: one thread, no network, a quiet tokenizer, swift of this checkout."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}",
    }


def run_child(command: Sequence[str], log: Path) -> Child:
    """Run a process to its end on one core (where ``taskset`` exists).

    Raises:
        SystemExit: the process failed; the message holds the end of its log.
    """
    command = list(command)
    if shutil.which("taskset"):
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=one_thread(), stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Child(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def read_marks(path: Path) -> list[Mark]:
    return [Mark(**json.loads(line)) for line in path.read_text().splitlines()]


def tokens_per_cpu_second(marks: Sequence[Mark], after_step: int) -> float:
    """Non-pad tokens per CPU second between the end of ``after_step`` and the last mark."""
    first = next(mark for mark in marks if mark.step == after_step)
    last = marks[-1]
    return (last.num_tokens - first.num_tokens) / (last.cpu_seconds - first.cpu_seconds)


def describe_machine() -> dict[str, Any]:
    """CPU, memory, system and package versions, for the head of a result."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_results(name: str, text: str, values: dict[str, Any]) -> None:
    """``results/NAME.md`` for people, ``results/NAME.json`` for programs; prints the text."""
    machine = describe_machine()
    RESULTS.mkdir(exist_ok=True)
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    foot = f"\n{machine['date']}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {versions}.\n"
    (RESULTS / f"{name}.md").write_text(text + foot, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine, **values}, indent=2) + "\n", encoding="utf-8"
    )
    print(text + foot)
