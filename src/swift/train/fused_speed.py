"""Which is fastest here: K runs fused, as separate processes, or one after another. The real model and data, timed.

``swift fuse --measure FILE`` prints the seconds that a step of every run takes by each plan, as one JSON line. A model
takes as long whatever it has learned, so nothing is trained: the steps are computed and forgotten.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.data.collate import collate
from swift.parallel.fused import MemberStep, clear_gradients, fused_gradients
from swift.train.assemble import make_engine, make_objective, tune_model
from swift.train.build import load_weights
from swift.train.prepare import Prepared, prepare
from swift.train.reference import reference_options
from swift.train.shared_base import SharedBase
from swift.tuners.switch import AdapterSwitch

__all__ = ["main", "measure"]

ROUNDS = 3
LEAST_SECONDS = 0.5
"""One timing covers so much, so that a small model is not measured by its noise."""
MOST_RUNS = 8
"""Of more runs, so many are measured: what a further one adds does not change any more."""
MOST_PROCESSES = 4
"""Beside each other on one accelerator; as `swift.experiments.scheduler.Policy.jobs_per_device`."""
WORKER_SECONDS = 300.0


@dataclass(frozen=True)
class _Bench:
    """Members on one model, each with one optimizer step at hand."""

    steps: list[MemberStep]
    switch: AdapterSwitch
    device: torch.device

    def alone(self) -> None:
        """A step of every member, one after another."""
        for step in self.steps:
            with self.switch.use(step.adapter):
                step.engine.forward_backward(step.batches, step.objective, step.seed)
            clear_gradients([step])

    def fused(self) -> None:
        fused_gradients(self.steps, self.switch)
        clear_gradients(self.steps)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(runs: Sequence[Resolved], file: Path, cores: int) -> dict[str, float]:
    """Seconds of one step of every run, by plan; ``file`` is handed to the processes that run beside each other.

    Plans take turns, round by round, and the best round counts. The number of threads is that at which a plan is
    fastest; separate processes share the cores.
    """
    processes = min(len(runs), MOST_PROCESSES if _is_accelerated(runs) else cores)
    separate = _separate(file, processes, len(runs), cores)  # before this process holds a model of its own
    bench = _bench(runs)
    best = {"sequence": float("inf"), "fused": float("inf")}
    bench.alone()
    bench.fused()
    for _ in range(ROUNDS):
        for threads in {1, cores} if bench.device.type == "cpu" else {torch.get_num_threads()}:
            torch.set_num_threads(threads)
            best["sequence"] = min(best["sequence"], _seconds(bench, bench.alone))
            best["fused"] = min(best["fused"], _seconds(bench, bench.fused))
    if separate is not None:
        best["separate"] = separate
    return best


def _is_accelerated(runs: Sequence[Resolved]) -> bool:
    from swift.core.devices import pick_device

    return pick_device(runs[0].config.model.device).type != "cpu"


def _seconds(bench: _Bench, function: Callable[[], None]) -> float:
    bench.wait()
    start, count = time.perf_counter(), 0
    while True:
        function()
        bench.wait()
        count += 1
        spent = time.perf_counter() - start
        if spent >= LEAST_SECONDS:
            return spent / count


def _bench(runs: Sequence[Resolved]) -> _Bench:
    base, steps, device = SharedBase(), [], torch.device("cpu")
    for resolved in runs:
        prepared = prepare(resolved)
        device = prepared.device
        steps.append(_step(prepared, base))
    return _Bench(steps, base.switch, device)


def _step(prepared: Prepared, base: SharedBase) -> MemberStep:
    """The first optimizer step of a run, on the shared model."""
    resolved, name = prepared.resolved, base.new_name()
    tuned = tune_model(
        base.weights(prepared, load_weights),
        resolved,
        device=prepared.device,
        dtype=prepared.dtype,
        total_steps=prepared.plan.total_steps,
        base=prepared.model_path,
        restored=True,  # the values of the adapter do not matter
        name=name,
    )
    more: dict[str, Any] = reference_options(prepared, tuned) if resolved.config.rlhf.rlhf_type else {}
    engine = make_engine(
        tuned,
        resolved,
        device=prepared.device,
        dtype=prepared.dtype,
        total_steps=prepared.plan.total_steps,
        tokenizer=prepared.template.tokenizer,
        **more,
    )
    pad = prepared.template.tokenizer.pad_token_id
    rows = prepared.schedule.micro_batches(0)[: prepared.plan.accumulation]
    batches = [collate(prepared.data.train, one, prepared.schedule.mode, pad) for one in rows]
    channels = prepared.data.channels[0] if prepared.data.channels else None
    objective = make_objective(resolved, channels, validation=False)
    return MemberStep(name, engine, batches, objective, resolved.config.training.seed)


def _separate(file: Path, processes: int, num_runs: int, cores: int) -> float | None:
    """Seconds of one step of every run in so many processes at a time; None when they do not come up."""
    command = [sys.executable, "-m", "swift", "fuse", "--measure", str(file), "--worker"]
    threads = max(1, cores // processes)
    workers = [
        subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline().strip() != "ready":
                return None
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        rates = [float(worker.communicate(timeout=WORKER_SECONDS)[0]) for worker in workers]
    except (ValueError, OSError, subprocess.TimeoutExpired):
        return None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return num_runs / sum(rates)


def _work(runs: Sequence[Resolved], threads: int) -> None:
    """One of the separate processes: steps of the first run, as a rate per second, while the others do the same."""
    bench = _bench(runs[:1])
    torch.set_num_threads(threads)
    bench.alone()
    bench.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < ROUNDS * LEAST_SECONDS:
        bench.alone()
        bench.wait()
        count += 1
    print(count / (time.perf_counter() - start), flush=True)


def main(file: Path, worker_threads: int | None = None) -> int:
    """``swift fuse --measure``."""
    wanted = json.loads(file.read_text())
    runs = []
    for values in wanted["runs"][:MOST_RUNS]:
        command = values.pop("command")
        runs.append(resolve(command, values=values))
    if worker_threads is not None:
        _work(runs, worker_threads)
        return 0
    scale = len(wanted["runs"]) / len(runs)
    print(
        json.dumps({plan: seconds * scale for plan, seconds in measure(runs, file, wanted["cores"]).items()})
    )
    return 0
