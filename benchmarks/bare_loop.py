"""A bare PyTorch loop on our own batches: the ceiling of this machine, and what our loop costs on top of it.

    python benchmarks/bare_loop.py                    ceilings, and `swift sft` beside them
    python benchmarks/bare_loop.py --mode packed      one bare loop only

The bare loop is what one would write by hand for this one job: transformers' Qwen3 with LoRA added to its linear
layers, logits only where there is a label, tensors prepared before the clock starts, no logging, no saving.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_work import make_work
from measure import (
    Mark,
    cpu_seconds,
    described_parser,
    markdown_table,
    median,
    read_marks,
    run_child,
    tokens_per_cpu_second,
    write_results,
)
from settings import (
    BATCH_SIZE,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    MAX_LENGTH,
    SEED,
    SWIFT_ROWS,
    swift_command,
)

IGNORE = -100
WARM_UP_STEPS = 5


def tokenize(model: str, data: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row that is not longer than MAX_LENGTH; labels only on assistant turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = []
    for line in data.read_text(encoding="utf-8").splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if len(ids) <= MAX_LENGTH:
            samples.append(
                (ids, [token if learned else IGNORE for token, learned in zip(ids, mask, strict=True)])
            )
    return samples


def make_batch(samples: list[tuple[list[int], list[int]]], rows: list[list[int]]) -> dict[str, Any]:
    """Right-padded tensors; positions restart with every document; targets are the next token of a document."""
    import torch

    width = max(sum(len(samples[sample][0]) for sample in row) for row in rows)
    ids, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    targets = torch.full((len(rows), width), IGNORE)
    documents = []
    for number, row in enumerate(rows):
        start, lengths = 0, []
        for sample in row:
            tokens, labels = samples[sample]
            end = start + len(tokens)
            ids[number, start:end] = torch.tensor(tokens)
            positions[number, start:end] = torch.arange(len(tokens))
            targets[number, start : end - 1] = torch.tensor(labels[1:])
            lengths.append(len(tokens))
            start = end
        documents.append([*lengths, width - start] if start < width else lengths)
    num_tokens = sum(len(samples[sample][0]) for row in rows for sample in row)
    return {
        "ids": ids,
        "positions": positions,
        "targets": targets,
        "documents": documents,
        "tokens": num_tokens,
    }


def add_lora(model: Any) -> list[Any]:
    """Replace every linear layer of the backbone by itself plus a LoRA path; returns the new parameters."""
    import torch
    from torch import nn

    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.empty(LORA_RANK, base.in_features))
            self.b = nn.Parameter(torch.zeros(base.out_features, LORA_RANK))
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a.to(x.dtype), self.b.to(x.dtype)
            return self.base(x) + (x @ a.T) @ b.T * (LORA_ALPHA / LORA_RANK)

    model.requires_grad_(False)
    parameters: list[Any] = []
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Lora(child))
                parameters += [getattr(parent, name).a, getattr(parent, name).b]
    return parameters


def attention_by_document(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """Causal attention; with ``documents`` each document of a row by itself."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    documents = kwargs.get("documents")
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "scale": kwargs.get("scaling")}
    if documents is None:
        output = scaled_dot_product_attention(query, key, value, **options)
        return output.transpose(1, 2), None
    rows = []
    for row, lengths in enumerate(documents):
        parts = [tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value)]
        rows.append(
            torch.cat(
                [scaled_dot_product_attention(*qkv, **options) for qkv in zip(*parts, strict=True)], dim=2
            )
        )
    return torch.cat(rows).transpose(1, 2), None


def run_loop(
    model_path: str, data: Path, mode: str, dtype_name: str, steps: int, profile: bool
) -> list[Mark]:
    """Train ``steps`` steps; a mark after each."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AttentionInterface, Qwen3ForCausalLM

    from swift.data.batching import BatchSchedule

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    samples = tokenize(model_path, data)
    schedule = BatchSchedule(
        [len(ids) for ids, _ in samples],
        batch_size=BATCH_SIZE,
        mode={"packed": "packed", "joined": "padding_free"}.get(mode, "padded"),  # type: ignore[arg-type]
        max_length=MAX_LENGTH,
        group_by_length=mode == "grouped",
        seed=SEED,
    )
    micro_batches = [rows for epoch in range(3) for rows in schedule.micro_batches(epoch)][:steps]
    batches = [make_batch(samples, rows) for rows in micro_batches]
    AttentionInterface.register("by_document", attention_by_document)
    dtype = getattr(torch, dtype_name)
    model = Qwen3ForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="by_document")
    parameters = add_lora(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    marks, num_tokens = [], 0
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile else None
    if profiler:
        profiler.start()
    for step, batch in enumerate(batches, 1):
        documents = batch["documents"] if mode in ("joined", "packed") else None
        hidden = model.model(
            input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False, documents=documents
        ).last_hidden_state
        learned = batch["targets"] != IGNORE
        logits = model.lm_head(hidden[learned]).float()
        cross_entropy(logits, batch["targets"][learned]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += batch["tokens"]
        marks.append(Mark(step, cpu_seconds(), num_tokens))
    if profiler:
        profiler.stop()
        print(
            profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40
            )
        )
    return marks


def measure_all(rounds: int, steps: int) -> None:
    """Bare loops and `swift sft` in turn; overhead of ours on the same batches."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        bare_modes = [
            ("padded", "float32"),
            ("grouped", "float32"),
            *[(row.bare_mode, row.dtype) for row in SWIFT_ROWS],
        ]
        rates: dict[str, list[float]] = {}
        for number in range(rounds):
            for mode, dtype in bare_modes:
                out = folder / f"bare-{mode}-{dtype}-{number}.jsonl"
                command = [sys.executable, __file__, "--mode", mode, "--dtype", dtype, "--steps", str(steps)]
                run_child([*command, "--out", str(out), "--work", str(folder)], out.with_suffix(".log"))
                bare = read_marks(out)
                rates.setdefault(f"bare {mode} {dtype}", []).append(
                    tokens_per_cpu_second(bare, WARM_UP_STEPS)
                )
                row = next((row for row in SWIFT_ROWS if (row.bare_mode, row.dtype) == (mode, dtype)), None)
                if row is None:
                    continue
                out = folder / f"swift-{row.name}-{number}"
                run_child(swift_command(row, model, data / "sft.jsonl", out, steps), out.with_suffix(".log"))
                ours = read_marks(out / "marks.jsonl")
                if [mark.num_tokens for mark in ours] != [mark.num_tokens for mark in bare]:
                    raise SystemExit(f"error: {row.name} did not train on the same batches as the bare loop")
                rates.setdefault(f"swift {mode} {dtype}", []).append(
                    tokens_per_cpu_second(ours, WARM_UP_STEPS)
                )
        report(rates)


def report(rates: dict[str, list[float]]) -> None:
    rows = []
    for name, values in rates.items():
        side, mode, dtype = name.split()
        overhead = "-"
        if side == "swift":
            pairs = zip(rates[f"bare {mode} {dtype}"], values, strict=True)
            overhead = f"{(median([bare / ours for bare, ours in pairs]) - 1) * 100:+.1f} %"
        rows.append([side, mode, dtype, f"{median(values):.0f}", overhead])
    text = "# Our loop beside a bare PyTorch loop on the same batches\n\n" + markdown_table(
        ["loop", "batches", "precision", "tokens per CPU-second", "time over the bare loop"], rows
    )
    write_results("bare_loop", text, {"tokens_per_cpu_second": rates})


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--mode", choices=["padded", "grouped", "joined", "packed"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder of make_work.py, when it exists already")
    parser.add_argument("--out", type=Path, help="write the marks of one loop here")
    parser.add_argument("--profile", action="store_true", help="show where the time of one loop goes")
    arguments = parser.parse_args()
    if arguments.mode is None:
        return measure_all(arguments.rounds, arguments.steps)
    with tempfile.TemporaryDirectory() as temporary:
        model, data = make_work(arguments.work or Path(temporary))
        marks = run_loop(
            str(model),
            data / "sft.jsonl",
            arguments.mode,
            arguments.dtype,
            arguments.steps,
            arguments.profile,
        )
    if arguments.out:
        lines = [json.dumps(dataclasses.asdict(mark)) for mark in marks]
        arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{tokens_per_cpu_second(marks, WARM_UP_STEPS):.0f} tokens per CPU-second")
    return None


if __name__ == "__main__":
    main()
