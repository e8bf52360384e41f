#!/usr/bin/env python3
"""Tokens per CPU second of the embedded engine, beside ``model.generate`` on the same prompts, on one thread.

    python benchmarks/engine_throughput.py [--rounds 5] [--write]

The 6.8M-parameter Qwen3 of make_work.py answers questions of its held-out data, 128 tokens each without an end
token. Measured in turns, in one process: transformers' ``generate`` with all prompts padded into one batch; the
engine with as many clients; the engine with three LoRA adapters (rank 8, all linear layers) mixed among the clients;
and the engine with 32 clients and prompts of which one in eight is 6 times as long. Figures are medians of rounds,
ratios medians of the ratios within a round.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_work import make_work
from measure import described_parser, markdown_table, median, write_results

NEW_TOKENS = 128


def read_prompts(bundle: Any, data: Path, count: int) -> list[list[int]]:
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
    first = [next(m for m in row["messages"] if m["role"] == "user") for row in rows]
    return [bundle.template.encode_prompt([message]) for message in first[:count]]


def write_adapters(bundle: Any, folder: Path) -> dict[str, Path]:
    """Three adapters of random numbers; the model is left as it was."""
    import torch

    from swift.tuners.apply import attach_adapter, remove_adapter
    from swift.tuners.lora import AdapterSpec
    from swift.tuners.peft_format import save_adapter

    names = [n for n, m in bundle.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    for name in "abc":
        attach_adapter(bundle.model, dict.fromkeys(names, AdapterSpec(rank=8, alpha=16)), name=name)
        save_adapter(bundle.model, folder / name, bundle.path, name=name)
    for name in "abc":
        remove_adapter(bundle.model, name)
    return {name: folder / name for name in "abc"}


def tokens_per_cpu_second(work: Callable[[], int]) -> float:
    started = time.process_time()
    return work() / (time.process_time() - started)


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write results/engine_throughput.{md,json}")
    arguments = parser.parse_args()

    import torch

    from swift.config.sections.template import TemplateSection
    from swift.inference.engines.base import Request, SamplingOptions
    from swift.inference.engines.embedded_core import EmbeddedCore
    from swift.models.load import load_bundle

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model, data = make_work(Path(scratch))
        bundle = load_bundle(model, TemplateSection(), dtype=torch.float32, device="cpu")
        prompts = read_prompts(bundle, data, 32)
        core = EmbeddedCore(bundle)
        adapters = write_adapters(bundle, Path(scratch))

        def engine(texts: list[list[int]], names: list[str | None], sampling: SamplingOptions) -> int:
            asked = [Request(str(i), text, sampling, names[i % len(names)]) for i, text in enumerate(texts)]
            return sum(len(answer.tokens) for answer in core.generate(asked))

        def generate(texts: list[list[int]]) -> int:
            width, pad = max(map(len, texts)), bundle.tokenizer.pad_token_id
            with torch.inference_mode():
                output = bundle.model.generate(
                    input_ids=torch.tensor([[pad] * (width - len(text)) + text for text in texts]),
                    attention_mask=torch.tensor(
                        [[0] * (width - len(text)) + [1] * len(text) for text in texts]
                    ),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=pad,
                )
            return int(output[:, width:].numel())

        greedy = SamplingOptions(max_tokens=NEW_TOKENS, temperature=0)
        sampled = SamplingOptions(max_tokens=NEW_TOKENS, top_p=0.9, seed=1)
        uneven = [text * 6 if i % 8 == 0 else text for i, text in enumerate(prompts)]
        works: dict[str, Callable[[], int]] = {
            "generate, 32 rows": lambda: generate(prompts),
            "engine, 32 clients": lambda: engine(prompts, [None], greedy),
            "engine, 32 clients, top_p 0.9": lambda: engine(prompts, [None], sampled),
            "generate, 8 rows": lambda: generate(prompts[:8]),
            "engine, 8 clients": lambda: engine(prompts[:8], [None], greedy),
            "generate, uneven prompts": lambda: generate(uneven),
            "engine, uneven prompts": lambda: engine(uneven, [None], greedy),
        }
        figures: dict[str, list[float]] = {}
        for number in range(arguments.rounds + 1):
            for name, work in works.items():
                figures.setdefault(name, []).append(tokens_per_cpu_second(work))
            for name, folder in adapters.items():
                core.load_adapter(name, folder)
            for label, names in (("one adapter", ["a"]), ("3 adapters mixed", ["a", "b", "c"])):
                mixed = tokens_per_cpu_second(lambda names=names: engine(prompts, names, greedy))  # type: ignore[misc]
                figures.setdefault(f"engine, {label}", []).append(mixed)
            for name in adapters:
                core.unload_adapter(name)
            if number == 0:
                figures.clear()  # the first round warms up

    pairs = [
        ("engine, 32 clients", "generate, 32 rows"),
        ("engine, 8 clients", "generate, 8 rows"),
        ("engine, uneven prompts", "generate, uneven prompts"),
        ("engine, 32 clients, top_p 0.9", "engine, 32 clients"),
        ("engine, one adapter", "engine, 32 clients"),
        ("engine, 3 adapters mixed", "engine, 32 clients"),
    ]
    ratios = {
        f"{one} / {other}": median([a / b for a, b in zip(figures[one], figures[other], strict=True)])
        for one, other in pairs
    }
    text = "# Embedded engine: tokens per CPU second\n\n" + markdown_table(
        ("work", "tokens per CPU second"),
        [(name, f"{median(values):,.0f}") for name, values in figures.items()],
    )
    text += "\n" + markdown_table(
        ("ratio", "median"), [(name, f"{value:.2f}") for name, value in ratios.items()]
    )
    if arguments.write:
        write_results("engine_throughput", text, {"figures": figures, "ratios": ratios})
    else:
        print(text)


if __name__ == "__main__":
    main()
