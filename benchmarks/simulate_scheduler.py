"""The scheduler against a queue that only counts devices, on paper, and the real time of its decisions.

    python benchmarks/simulate_scheduler.py [--output FILE.json]

Scenarios are SIMULATED: a virtual clock, eight devices of 80 GB that do not exist, run times that are assumptions
(tests/simulation/scheduler_simulator.py has the model of speed). Only the placement decisions are the real ones, and
only the decision times at the end are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "simulation"))

from scheduler_simulator import GIB, SCENARIOS, Work, fifo_by_count, machine, mixed, ours, simulate, small

from swift.core.devices import describe_cpu
from swift.core.format import format_duration
from swift.experiments.scheduler import Policy, QueuedJob, decide
from swift.experiments.types import Needs

SEEDS = 20


def compare(work: list[Work]) -> dict[str, dict[str, float]]:
    """Both queues on the same jobs."""
    rows = {}
    for name, choose in (("FIFO by count", fifo_by_count), ("swift", ours(Policy()))):
        outcome = simulate(work, choose)
        rows[name] = {
            "makespan_seconds": outcome.makespan,
            "mean_wait_seconds": outcome.mean_wait,
            "p95_wait_seconds": outcome.wait_quantile(0.95),
            "max_wait_seconds": max(outcome.waits),
            "compute_share": outcome.compute_share,
        }
    return rows


def average(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.mean(result[name][key] for result in results) for key in row}
        for name, row in results[0].items()
    }


def decision_times(count: int = 1000, repeats: int = 20) -> dict[str, float]:
    """Milliseconds for one round over ``count`` queued jobs on 8 idle devices, no two jobs of the same size."""
    queue = [
        QueuedJob(
            f"j{n}",
            f"g{n % 20}",
            n,
            Needs(devices=(1, 1, 1, 2, 4, 8)[n % 6]),
            (5 + n % 60) * GIB + n,
            n % 3,
            float(n),
        )
        for n in range(count)
    ]
    inventory = machine()
    times: list[float] = []
    for _ in range(repeats):
        begin = time.process_time()
        decisions = decide(queue, inventory, [], 5000.0)
        times.append(1000 * (time.process_time() - begin))
    assert len(decisions) == count
    return {"jobs": count, "median_ms": statistics.median(times), "max_ms": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    output = parser.parse_args().output
    scenarios = {name: compare(make()) for name, make in SCENARIOS.items()}
    scenarios[f"mixed day, mean of {SEEDS} seeds"] = average([compare(mixed(seed)) for seed in range(SEEDS)])
    scenarios[f"LoRA day, mean of {SEEDS} seeds"] = average([compare(small(seed)) for seed in range(SEEDS)])
    print("SIMULATION: virtual clock, 8 devices of 80 GB that do not exist, assumed run times.\n")
    print(f"{'':38} {'makespan':>10} {'mean wait':>10} {'p95 wait':>10} {'max wait':>10} {'compute':>8}")
    for name, rows in scenarios.items():
        print(name)
        for queue, row in rows.items():
            keys = ("makespan_seconds", "mean_wait_seconds", "p95_wait_seconds", "max_wait_seconds")
            times = " ".join(f"{format_duration(row[key]):>10}" for key in keys)
            print(f"  {queue:36} {times} {row['compute_share']:8.0%}")
    decisions = decision_times()
    cpu = describe_cpu()
    print(
        f"\nMEASURED: one decision over {decisions['jobs']} queued jobs on 8 devices: median"
        f" {decisions['median_ms']:.1f} ms, at most {decisions['max_ms']:.1f} ms of CPU time ({cpu['name']})"
    )
    if output is not None:
        record: dict[str, Any] = {"simulated": scenarios, "measured": {"decision": decisions, "cpu": cpu}}
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
