"""Eight short LoRA runs: one `swift sft` after another, and the same eight handed to `swift run`.

    python benchmarks/experiments_per_hour.py [--steps 30] [--jobs 8]

One after another, each run has both cores (two threads: its best setting here); in the queue, each job has one core
and two run at a time. Wall time from the first command to the end of the last, start-up included. Losses are compared
at equal threads, to the last digit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from make_work import make_work
from measure import described_parser, markdown_table, write_results
from settings import option_words

SWIFT = (sys.executable, "-m", "swift")


def options(model: Path, data: Path, out: Path, steps: int) -> dict[str, Any]:
    """The setting of the SFT measurement, without automatic evaluation."""
    return {
        "model": str(model),
        "dataset": str(data / "sft.jsonl"),
        "output_dir": str(out),
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 512,
        "max_steps": steps,
        "logging_steps": 10,
    }


def run(words: list[str], home: Path, threads: int) -> float:
    """Wall seconds of one command."""
    environment = {**os.environ, "SWIFT_HOME": str(home), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    subprocess.run([*SWIFT, *words], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=3600)
    return time.perf_counter() - started


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=8)
    arguments = parser.parse_args()
    rates = [round(1e-3 * (1 + number / 4), 6) for number in range(arguments.jobs)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        common = options(model, data, folder / "queued", arguments.steps)
        file = folder / "experiments.yaml"
        experiments = {f"run{number}": {"learning_rate": rate} for number, rate in enumerate(rates)}
        file.write_text(yaml.safe_dump({"name": "eight", "defaults": common, "experiments": experiments}))
        queued = run(["run", str(file)], folder / "home-queued", 1)
        subprocess.run(
            [*SWIFT, "service", "stop"],
            env={**os.environ, "SWIFT_HOME": str(folder / "home-queued")},
            check=True,
        )
        alone = 0.0
        for number, rate in enumerate(rates):
            words = ["sft", "--learning_rate", str(rate), "--run_name", f"run{number}"]
            words += option_words({**common, "output_dir": folder / "alone"})
            alone += run(words, folder / "home-alone", 2)
        words[words.index("--run_name") + 1] = "one-thread"
        run(words, folder / "home-alone", 1)
        same = losses(folder / "alone" / "one-thread") == losses(folder / "queued" / f"run{len(rates) - 1}")
    rows = [
        ["one after another, two threads each", f"{alone:.1f} s", f"{3600 * len(rates) / alone:.0f}", "1.00"],
        [
            "`swift run`, two at a time",
            f"{queued:.1f} s",
            f"{3600 * len(rates) / queued:.0f}",
            f"{alone / queued:.2f}",
        ],
    ]
    text = (
        f"# Experiments per hour\n\n{len(rates)} LoRA runs of {arguments.steps} steps, start-up included.\n"
        f"Losses at equal threads are {'equal to the last digit' if same else 'NOT equal'}.\n\n"
    )
    table = markdown_table(["way", "wall time", "experiments per hour", "times"], rows)
    write_results(
        "experiments_per_hour",
        text + table,
        {"alone_seconds": alone, "queued_seconds": queued, "same_losses": same},
    )


if __name__ == "__main__":
    main()
