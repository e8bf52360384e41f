"""Supervised fine-tuning beside TRL: same model, same data, same settings, in turn, one thread.

    python benchmarks/sft_vs_trl.py [--rounds 2] [--steps 30]

Every figure is CPU time (user + system) of one process, so a busy machine disturbs it little; the ratio of two
runs of the same round disturbs less. Columns:

- tokens per CPU-second: non-pad tokens between the end of step 5 and the last step;
- times TRL: the same, divided by TRL's of the same round (median over rounds);
- first step: CPU-seconds from the launch of the process to the end of the first optimizer step;
- peak memory: highest resident set of the process;
- held-out loss: see ``heldout_loss.py``; after one pass over the same rows in steps of about the same size, seeds
  differing between rounds. Packed rows are 3.5 times as long as samples, so these runs take 2 rows a step.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from make_work import make_work
from measure import (
    HERE,
    Child,
    Mark,
    described_parser,
    markdown_table,
    median,
    one_thread,
    read_marks,
    run_child,
    tokens_per_cpu_second,
    write_results,
)
from settings import BATCH_SIZE, SEED, SWIFT_ROWS, SwiftRow, swift_command

WARM_UP_STEPS = 5
ONE_PASS = -1
LOSS_ROWS = 1000
PACKED_LOSS_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured process."""

    name: str
    child: Child
    marks: list[Mark]

    @property
    def rate(self) -> float:
        return tokens_per_cpu_second(self.marks, WARM_UP_STEPS)


def run_trl(model: Path, data: Path, out: Path, steps: int, seed: int) -> Run:
    command = [sys.executable, str(HERE / "trl_sft.py"), str(model), str(data), str(out)]
    child = run_child([*command, "--steps", str(steps), "--seed", str(seed)], out.with_suffix(".log"))
    return Run("TRL", child, read_marks(out / "marks.jsonl"))


def run_swift(
    row: SwiftRow, model: Path, data: Path, out: Path, steps: int, seed: int, batch_size: int
) -> Run:
    command = swift_command(row, model, data, out, steps, batch_size=batch_size, seed=seed)
    child = run_child(command, out.with_suffix(".log"))
    return Run(f"swift {row.name}", child, read_marks(out / "marks.jsonl"))


def measure_speed(model: Path, data: Path, folder: Path, rounds: int, steps: int) -> dict[str, list[Run]]:
    """TRL, then each of our rows, again and again."""
    runs: dict[str, list[Run]] = {}
    for number in range(rounds):
        out = folder / f"speed-{number}"
        out.mkdir()
        new = [run_trl(model, data / "sft.jsonl", out / "trl", steps, SEED)]
        for row in SWIFT_ROWS:
            new.append(run_swift(row, model, data / "sft.jsonl", out / row.name, steps, SEED, BATCH_SIZE))
        for run in new:
            print(f"round {number + 1}: {run.name}: {run.rate:.0f} tokens per CPU-second", flush=True)
            runs.setdefault(run.name, []).append(run)
    return runs


def heldout_loss(model: Path, adapter: Path, data: Path) -> float:
    command = [
        sys.executable,
        str(HERE / "heldout_loss.py"),
        str(model),
        str(adapter),
        str(data / "heldout.jsonl"),
    ]
    done = subprocess.run(command, env=one_thread(), check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure_losses(model: Path, data: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Held-out loss of each side after one pass over the same LOSS_ROWS rows; one value a seed."""
    losses: dict[str, list[float]] = {}
    rows = (data / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:LOSS_ROWS]
    part = folder / "part.jsonl"
    part.write_text("".join(rows), encoding="utf-8")
    for number in range(rounds):
        out, seed = folder / f"loss-{number}", SEED + number
        out.mkdir()
        run_trl(model, part, out / "trl", ONE_PASS, seed)
        losses.setdefault("TRL", []).append(heldout_loss(model, out / "trl" / "adapter", data))
        for row in SWIFT_ROWS:
            batch_size = PACKED_LOSS_BATCH if row.bare_mode == "packed" else BATCH_SIZE
            run = run_swift(row, model, part, out / row.name, ONE_PASS, seed, batch_size)
            losses.setdefault(run.name, []).append(heldout_loss(model, out / row.name / "last", data))
        newest = {name: round(values[-1], 4) for name, values in losses.items()}
        print(f"round {number + 1}: held-out losses {json.dumps(newest)}", flush=True)
    return losses


def report(speed: dict[str, list[Run]], losses: dict[str, list[float]], steps: int) -> None:
    rows: list[list[str]] = []
    values: dict[str, dict[str, list[float]]] = {}
    for name, runs in speed.items():
        trl = speed["TRL"]
        figures: dict[str, list[float]] = {
            "tokens_per_cpu_second": [run.rate for run in runs],
            "times_trl": [run.rate / other.rate for run, other in zip(runs, trl, strict=True)],
            "first_step_cpu_seconds": [run.marks[0].cpu_seconds for run in runs],
            "first_step_share_of_trl": [
                run.marks[0].cpu_seconds / other.marks[0].cpu_seconds
                for run, other in zip(runs, trl, strict=True)
            ],
            "peak_rss_bytes": [run.child.peak_rss_bytes for run in runs],
            "peak_rss_share_of_trl": [
                run.child.peak_rss_bytes / other.child.peak_rss_bytes
                for run, other in zip(runs, trl, strict=True)
            ],
            "heldout_loss": losses.get(name, []),
        }
        values[name] = figures
        rows.append(
            [
                name,
                f"{median(figures['tokens_per_cpu_second']):.0f}",
                f"{median(figures['times_trl']):.2f}",
                f"{median(figures['first_step_cpu_seconds']):.1f} s"
                f" ({median(figures['first_step_share_of_trl']):.2f} of TRL)",
                f"{median(figures['peak_rss_bytes']) / 2**20:.0f} MiB"
                f" ({median(figures['peak_rss_share_of_trl']):.2f} of TRL)",
                ", ".join(f"{loss:.3f}" for loss in losses.get(name, [])) or "-",
            ]
        )
    header = ["run", "tokens per CPU-second", "times TRL", "first step", "peak memory", "held-out loss"]
    text = (
        "# Supervised fine-tuning beside TRL\n\n"
        "Qwen3 with 6.8M random parameters, LoRA rank 8 on all linear layers, batch 8 (packed: 8 rows), at most 512\n"
        f"tokens, no gradient checkpointing, one thread, {steps} steps, {len(speed['TRL'])} rounds in turn; float32\n"
        "unless the name says bf16. A packed step has 3.5 times the tokens of a step of samples.\n"
    )
    if losses:
        text += f"Held-out loss after one pass over {LOSS_ROWS:,} rows, one value a seed.\n"
    text += "\n"
    write_results("sft_vs_trl", text + markdown_table(header, rows), {"runs": values})


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--no_losses", action="store_true", help="leave out the held-out losses")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        speed = measure_speed(model, data, folder, arguments.rounds, arguments.steps)
        losses = {} if arguments.no_losses else measure_losses(model, data, folder, arguments.rounds)
        report(speed, losses, arguments.steps)


if __name__ == "__main__":
    main()
