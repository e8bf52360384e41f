#!/usr/bin/env python3
"""Tokenising many conversations with two workers: our data path beside ``datasets.map`` as TRL's SFTTrainer calls it.

    python benchmarks/tokenise.py [--rows 100000] [--rounds 3] [--workers 2]

Both sides start from the same .jsonl, render the same chat template, mask what is not the assistant's, and leave a file
that training reads: ours the token store, theirs the Arrow file of ``datasets``. They take turns; each turn is a
process of its own with an empty cache. CPU-seconds (user, children included) are the figure: other work on the machine
disturbs them little; wall-clock times are given beside them. Writes ``results/tokenise.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
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


def theirs(model: Path, data: Path, workers: int) -> int:
    """Tokens kept by ``datasets.map`` with the function that TRL maps: the chat template with its assistant mask."""
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


def child(side: str, model: Path, data: Path, workers: int) -> None:
    """One turn: prints tokens, CPU-seconds and wall seconds since the process began to import."""
    start = time.perf_counter()
    tokens = {"ours": ours, "theirs": theirs}[side](model, data, workers)
    # Our workers are children of the fork server: their time counts here once it has ended and been waited for.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime for usage in usages)
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
            for side in ("ours", "theirs"):
                turns.append(
                    {"round": number, "side": side, **run(side, model, folder, number, arguments.workers)}
                )
                print(turns[-1], flush=True)
    write(turns, arguments)


def run(side: str, model: Path, folder: Path, number: int, workers: int) -> dict[str, Any]:
    cache = str(folder / f"cache-{side}-{number}")
    environment = {**os.environ, "SWIFT_HOME": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": cache}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--workers", str(workers)]
    command += ["--child", side, str(model), str(folder / "rows.jsonl")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def write(turns: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    def ratios(figure: str) -> list[float]:
        by = {(turn["round"], turn["side"]): turn[figure] for turn in turns}
        return [round(by[n, "theirs"] / by[n, "ours"], 2) for n in range(arguments.rounds)]

    cpu, wall = ratios("cpu"), ratios("wall")
    record = {
        "rows": arguments.rows,
        "workers": arguments.workers,
        "turns": turns,
        "cpu_ratio": cpu,
        "wall_ratio": wall,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
    }
    (RESULTS / "tokenise.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Tokenising beside datasets.map",
        "",
        f"{arguments.rows} conversations, {arguments.workers} workers, {arguments.rounds} rounds in turn.",
        "",
        "| round | ours CPU-s | theirs CPU-s | ours wall s | theirs wall s |",
        "|---|---|---|---|---|",
    ]
    for n in range(arguments.rounds):
        one, other = (
            next(t for t in turns if t["round"] == n and t["side"] == side) for side in ("ours", "theirs")
        )
        lines.append(f"| {n + 1} | {one['cpu']} | {other['cpu']} | {one['wall']} | {other['wall']} |")
    median = statistics.median
    lines += ["", f"Median ratio: {median(cpu)} of CPU-seconds (user), {median(wall)} of wall-clock time."]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [f"Load average at the end, this work included: {load}. The aim is 1.5.", ""]
    (RESULTS / "tokenise.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
