"""Direct preference optimisation beside TRL: same model, same pairs, same settings, in turn, one thread.

    python benchmarks/dpo_vs_trl.py [--rounds 3] [--steps 20]

LoRA rank 8 on all linear layers, 8 pairs a step, the reference is the adapter switched off. Columns:

- CPU-seconds a step: user + system time between the end of step 5 and the last step, of the process on one core;
- of TRL: the same, divided by TRL's of the same round (median over rounds);
- peak above imports: highest resident set of the process, less that of a process that only imports the same; on the
  6.8M model of the other measurements and on a tiny model with 131,072 tokens, where logits are what costs.

The order of the samples differs (each side shuffles by itself), so the losses only show that both learn alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_work import make_work
from measure import (
    HERE,
    Child,
    Mark,
    markdown_table,
    median,
    read_marks,
    run_child,
    write_results,
)

WARM_UP_STEPS = 5
VOCABULARY = 131_072
MEMORY_STEPS = 6
SOURCE = {"PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured process."""

    child: Child
    marks: list[Mark]
    losses: list[float]

    @property
    def step_seconds(self) -> float:
        first = next(mark for mark in self.marks if mark.step == WARM_UP_STEPS)
        return (self.marks[-1].cpu_seconds - first.cpu_seconds) / (self.marks[-1].step - first.step)


def run_trl(model: Path, data: Path, out: Path, steps: int) -> Run:
    words = [sys.executable, str(HERE / "trl_dpo.py"), str(model), str(data), str(out), "--steps", str(steps)]
    child = run_child(words, out.with_suffix(".log"))
    return Run(child, read_marks(out / "marks.jsonl"), json.loads((out / "losses.json").read_text()))


def run_swift(model: Path, data: Path, out: Path, steps: int) -> Run:
    options = {
        "--rlhf_type": "dpo",
        "--model": model,
        "--dataset": data,
        "--output_dir": out.parent,
        "--run_name": out.name,
        "--lora_rank": 8,
        "--lora_alpha": 16,
        "--lora_dropout": 0,
        "--learning_rate": 1e-4,
        "--lr_scheduler_type": "constant",
        "--weight_decay": 0,
        "--adam_beta2": 0.999,
        "--beta": 0.1,
        "--per_device_train_batch_size": 8,
        "--gradient_accumulation_steps": 1,
        "--max_length": 512,
        "--max_steps": steps,
        "--logging_steps": 1,
        "--load_from_cache_file": "false",
        "--save_strategy": "no",
        "--callbacks": HERE / "record_marks.py",
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    command = [sys.executable, "-m", "swift.cli.main", "rlhf", *words]
    child = run_child(command, out.with_suffix(".log"), SOURCE)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Run(child, read_marks(out / "marks.jsonl"), [line["loss"] for line in lines if "loss" in line])


def import_bytes(folder: Path) -> dict[str, int]:
    """Resident memory of a process that only imports what each side imports."""
    trl = [sys.executable, str(HERE / "trl_dpo.py"), "-", "-", str(folder / "imports"), "--imports"]
    code = "import torch, transformers, swift.train.run; from transformers import AutoTokenizer, Qwen3ForCausalLM"
    return {
        "TRL": run_child(trl, folder / "imports-trl.log").peak_rss_bytes,
        "swift": run_child([sys.executable, "-c", code], folder / "imports.log", SOURCE).peak_rss_bytes,
    }


def large_vocabulary(model: Path, folder: Path) -> Path:
    """A tiny model of the same tokenizer whose embedding and logits have ``VOCABULARY`` rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.vocab_size, config.hidden_size, config.num_hidden_layers = VOCABULARY, 64, 2
    config.intermediate_size, config.tie_word_embeddings = 128, True
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    config.layer_types = ["full_attention"] * 2
    torch.manual_seed(0)
    target = folder / "large-vocabulary"
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


SIDES = {"TRL": run_trl, "swift": run_swift}


def measure(model: Path, data: Path, folder: Path, rounds: int, steps: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    folder.mkdir()
    for number in range(rounds):
        for name, run_side in SIDES.items():
            run = run_side(model, data, folder / f"{name}-{number}", steps)
            runs[name].append(run)
            seconds = f"{run.step_seconds:.3f} CPU-s a step" if steps > MEMORY_STEPS else f"{steps} steps"
            peak = run.child.peak_rss_bytes / 2**20
            print(f"round {number + 1}: {name}: {seconds}, peak {peak:.0f} MiB", flush=True)
    return runs


def report(
    speed: dict[str, list[Run]], memory: dict[str, list[Run]], imports: dict[str, int], steps: int
) -> None:
    values: dict[str, Any] = {"imports_bytes": imports, "runs": {}}
    rows = []
    for name, runs in speed.items():
        above = {
            "small": [run.child.peak_rss_bytes - imports[name] for run in runs],
            "large_vocabulary": [run.child.peak_rss_bytes - imports[name] for run in memory[name]],
        }
        shares = {
            kind: [
                one / (other.child.peak_rss_bytes - imports["TRL"])
                for one, other in zip(mine, of["TRL"], strict=True)
            ]
            for (kind, mine), of in zip(above.items(), (speed, memory), strict=True)
        }
        seconds = [run.step_seconds for run in runs]
        times = [one / other.step_seconds for one, other in zip(seconds, speed["TRL"], strict=True)]
        values["runs"][name] = {
            "step_cpu_seconds": seconds,
            "share_of_trl": times,
            "peak_above_imports_bytes": above,
            "peak_share_of_trl": shares,
            "losses": [run.losses for run in runs],
        }
        cells = [
            f"{median(above[kind]) / 2**20:.0f} MiB ({median(shares[kind]):.2f} of TRL)" for kind in above
        ]
        rows.append([name, f"{median(seconds):.3f}", f"{median(times):.2f}", *cells])
    header = ["run", "CPU-seconds a step", "of TRL", "peak above imports", f"the same, {VOCABULARY:,} tokens"]
    text = (
        "# Direct preference optimisation beside TRL\n\n"
        f"Qwen3 with 6.8M random parameters, LoRA rank 8 on all linear layers, 8 pairs a step, at most 512 tokens,\n"
        f"float32, one thread, {steps} steps, {len(speed['TRL'])} rounds in turn.\n\n"
    )
    write_results("dpo_vs_trl", text + markdown_table(header, rows), values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        imports = import_bytes(folder)
        speed = measure(model, data / "dpo.jsonl", folder / "speed", arguments.rounds, arguments.steps)
        large = large_vocabulary(model, folder)
        memory = measure(large, data / "dpo.jsonl", folder / "memory", arguments.rounds, MEMORY_STEPS)
        report(speed, memory, imports, arguments.steps)


if __name__ == "__main__":
    main()
