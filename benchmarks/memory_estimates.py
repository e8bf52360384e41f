#!/usr/bin/env python3
"""Memory estimates of ``swift plan`` beside what tiny trainings hold on the CPU, and what the estimates cost.

    python benchmarks/memory_estimates.py [--only-cost]

The trainings and the counter of living tensor bytes are those of ``tests/plan`` (``memory_cases.py``,
``live_tensors.py``): real runs, counted by weak references to storages. Formulas and trace are judged apart. The cost
is CPU-seconds for the shape of Qwen3-8B (LoRA, 2,048 tokens), imports apart, the least of three processes;
``--only-cost`` measures it anew and keeps the errors as they were.
Writes ``results/memory_estimates.json`` and ``.md``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import RESULTS, markdown_table, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "plan"))

IMPORTS = "imports"
COST = """
import time
clock = time.process_time
from swift.config.bind import resolve
from swift.plan.plan import make_plan
words = "--model qwen3-8b --dataset none.jsonl --device cuda".split()
resolved = resolve("sft", words, planning=True)
make_plan(resolved, device_memory=24 << 30)
start = clock()
make_plan(resolved, device_memory=24 << 30)
formulas = clock() - start
from swift.cli.plan import traced
start = clock()
import torch, transformers, swift.train.memory
transformers.Qwen3ForCausalLM
imports = clock() - start
start = clock()
make_plan(resolved, device_memory=24 << 30, exact=traced)
print(formulas, imports, clock() - start)
"""


def cost() -> dict[str, float]:
    """CPU-seconds of one estimate, by method."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COST],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=300,
        )
        runs.append([float(word) for word in done.stdout.split()])
    least = [round(min(column), 3) for column in zip(*runs, strict=True)]
    return dict(zip(("formulas", IMPORTS, "trace"), least, strict=True))


def errors(home: Path) -> dict[str, dict[str, Any]]:
    """Name of a training -> what was counted, and the relative errors."""
    from memory_cases import CASES, compare

    found: dict[str, dict[str, Any]] = {}
    for name in CASES:
        counted, formulas, trace = compare(name, home)
        passing = sum(formulas[part] for part in ("activations", "logits", "temporary"))
        found[name] = {
            "counted_bytes": counted,
            "formulas": sum(formulas.values()) / counted - 1,
            "trace": sum(trace.values()) / counted - 1,
            "activations_and_logits": passing / sum(formulas.values()),
        }
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    return found


def summary(found: dict[str, dict[str, Any]], method: str) -> dict[str, float]:
    sizes = sorted(abs(entry[method]) for entry in found.values())
    return {
        "median": statistics.median(sizes),
        "p95": sizes[int(0.95 * len(sizes))],
        "largest": sizes[-1],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SWIFT_HOME"] = folder
        seconds, load = cost(), round(os.getloadavg()[0], 1)
        if "--only-cost" in sys.argv[1:]:
            found = json.loads((RESULTS / "memory_estimates.json").read_text(encoding="utf-8"))["cases"]
        else:
            found = errors(Path(folder))
    summaries = {method: summary(found, method) for method in ("formulas", "trace")}
    values = {"cpu_seconds_8b": seconds, "load": load, "errors": summaries, "cases": found}
    write_results("memory_estimates", report(values), values)


def report(values: dict[str, Any]) -> str:
    cases, seconds = values["cases"], values["cpu_seconds_8b"]
    dominated = sum(entry["activations_and_logits"] > 0.5 for entry in cases.values())
    methods = [
        [method, *(f"{sizes[name]:.1%}" for name in ("median", "p95", "largest")), f"{seconds[method]:.2f}"]
        for method, sizes in values["errors"].items()
    ]
    rows = [
        [
            name,
            f"{entry['counted_bytes'] / 1e6:.1f}",
            f"{entry['formulas']:+.1%}",
            f"{entry['trace']:+.1%}",
            f"{entry['activations_and_logits']:.0%}",
        ]
        for name, entry in cases.items()
    ]
    return (
        "# Memory estimates beside counted bytes\n\n"
        f"{len(cases)} tiny trainings on the CPU; in {dominated} of them more than half is activations, logits and what"
        " passes.\nErrors are (estimate / bytes of living tensors counted in the run) - 1.\n\n"
        + markdown_table(["", "median", "95th percentile", "largest", "CPU-seconds, 8B shape"], methods)
        + f"\nImports of torch, transformers and the model, which the trace needs: {seconds[IMPORTS]:.2f} CPU-seconds"
        f" on top. Load average while this was measured: {values['load']:.1f}.\n\n"
        + markdown_table(["training", "counted MB", "formulas", "trace", "activations, logits"], rows)
    )


if __name__ == "__main__":
    main()
