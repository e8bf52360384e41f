#!/usr/bin/env python3
"""Tokenising many conversations with two workers: our data path beside the data preparation of TRL's SFTTrainer.

    python benchmarks/tokenise.py [--rows 100000] [--rounds 3] [--workers 2]

All sides start from the same .jsonl, render the same chat template, learn what is the assistant's, cut at the same
length and leave a file that training reads: ours the token store, theirs the Arrow files of ``datasets``.

- ``trl`` runs ``SFTTrainer._prepare_dataset`` as it is installed: one ``map`` each for tokens, labels and cut, then a
  ``filter`` for rows with nothing to learn.
- ``map`` is the least that ``datasets.map`` could do, and TRL does not: tokens with their mask, then a batched cut.

They take turns; each turn is a process of its own with an empty cache. CPU-seconds (user, children included) are the
figure: other work on the machine disturbs them little; wall-clock times are given beside them. Needs trl and datasets.
Writes ``results/tokenise.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RESULTS = Path(__file__).parent / "results"
MAX_LENGTH = 512


def ours(model: Path, data: Path, workers: int) -> int:
    """Tokens kept by our path."""
    from swift.config.bind import resolve
    from swift.data.load import load_data
    from swift.models.load import load_template

    values = {
        "model": str(model),
        "dataset": str(data),
        "max_length": MAX_LENGTH,
        "truncation_strategy": "right",
        "dataset_num_proc": workers,
    }
    resolved = resolve("sft", values=values)
    template = load_template(model, resolved.config.template)
    return load_data(resolved, template, MAX_LENGTH).train.num_tokens


def trl(model: Path, data: Path, workers: int) -> int:
    """Tokens kept by TRL: the data preparation of its SFTTrainer itself, without the trainer around it.

    It reads of the trainer only what is given here; ``assistant_only_loss`` asks for the labels that ours makes.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    args = SFTConfig(
        output_dir=os.environ["HF_HOME"],
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        dataset_num_proc=workers,
        use_cpu=True,
        bf16=False,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    dataset = load_dataset("json", data_files=str(data), split="train")
    dataset = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")
    return sum(map(len, dataset["input_ids"]))


def bare_map(model: Path, data: Path, workers: int) -> int:
    """Tokens kept by two ``datasets.map`` alone, less than TRL does: chat template with mask, then a batched cut."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        processed = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return {name: processed[name] for name in ("input_ids", "assistant_masks")}

    dataset = load_dataset("json", data_files=str(data), split="train")
    dataset = dataset.map(tokenize, num_proc=workers, remove_columns=dataset.column_names)
    dataset = dataset.map(_truncate, batched=True, num_proc=workers)
    return sum(map(len, dataset["input_ids"]))


def _truncate(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [values[:MAX_LENGTH] for values in column] for name, column in examples.items()}


SIDES = {"ours": ours, "trl": trl, "map": bare_map}
IMPORTS = {"ours": (), "trl": ("datasets", "trl.trainer.sft_trainer"), "map": ("datasets",)}
"""What is imported before the clock runs: theirs only, lest the size of their packages counts against them."""


def child(side: str, model: Path, data: Path, workers: int) -> None:
    """One turn: prints tokens, CPU-seconds and wall seconds. Ours counts its imports, theirs does not."""
    for name in IMPORTS[side]:
        importlib.import_module(name)
    start, cpu = time.perf_counter(), -resource.getrusage(resource.RUSAGE_SELF).ru_utime
    tokens = SIDES[side](model, data, workers)
    # Our workers are children of the fork server: their time counts here once it has ended and been waited for.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu += sum(usage.ru_utime for usage in usages)
    print(json.dumps({"tokens": tokens, "cpu": round(cpu, 2), "wall": round(time.perf_counter() - start, 2)}))


def make_rows(path: Path, work: Path, rows: int) -> None:
    """``rows`` conversations made of the 2,000 of ``make_work``, each with its number, so that none is the same."""
    lines = work.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = json.loads(lines[number % len(lines)])
            row["messages"][-1]["content"] += f" ({number})"
            file.write(json.dumps({"messages": row["messages"]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "MODEL", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, model, data = arguments.child
        child(side, Path(model), Path(data), arguments.workers)
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        from make_work import make_work

        model, data = make_work(folder)
        make_rows(folder / "rows.jsonl", data / "sft.jsonl" if data.is_dir() else data, arguments.rows)
        turns: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            for side in SIDES:
                turns.append(
                    {"round": number, "side": side, **run(side, model, folder, number, arguments.workers)}
                )
                print(turns[-1], flush=True)
    write(turns, arguments)


def run(side: str, model: Path, folder: Path, number: int, workers: int) -> dict[str, Any]:
    cache = str(folder / f"cache-{side}-{number}")
    environment = {**os.environ, "SWIFT_HOME": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": cache}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, __file__, "--workers", str(workers)]
    command += ["--child", side, str(model), str(folder / "rows.jsonl")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def write(turns: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    by = {(turn["round"], turn["side"]): turn for turn in turns}
    rounds = range(arguments.rounds)
    ratios = {
        f"{side} {figure}": [round(by[n, side][figure] / by[n, "ours"][figure], 2) for n in rounds]
        for side in ("trl", "map")
        for figure in ("cpu", "wall")
    }
    median = {name: statistics.median(values) for name, values in ratios.items()}
    record = {
        "rows": arguments.rows,
        "workers": arguments.workers,
        "turns": turns,
        "ratios": ratios,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
    }
    (RESULTS / "tokenise.json").write_text(json.dumps(record, indent=1) + "\n")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# Tokenising beside TRL's data preparation",
        "",
        f"{arguments.rows} conversations, {arguments.workers} workers, {arguments.rounds} rounds in turn.",
        "",
        "| round | ours CPU-s | TRL CPU-s | map CPU-s | ours wall s | TRL wall s | map wall s |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {n + 1} | " + " | ".join(str(by[n, s][f]) for f in ("cpu", "wall") for s in SIDES) + " |"
            for n in rounds
        ),
        "",
        f"Median ratio to TRL: {median['trl cpu']} of CPU-seconds (user), {median['trl wall']} of wall-clock time"
        " (the aim is 1.5).",
        f"To `datasets.map` for tokens and cut alone, without labels: {median['map cpu']} and {median['map wall']}.",
        f"Load average at the end, this work included: {load}.",
        "",
    ]
    (RESULTS / "tokenise.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
