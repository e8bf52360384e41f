"""Estimates of memory held against what a real training holds, counted independently (``live_tensors.py``).

Formulas and traces are judged apart. Half of the cases are dominated by activations or logits. What the process and the
allocator need on top (``context``, ``reserve``) is no tensor and is left out.
"""

import json
import statistics

import pytest
from live_tensors import LiveTensors, PeakOfSteps

from swift.cli.plan import traced
from swift.config.bind import resolve
from swift.models.tiny import make_tiny_model
from swift.plan.plan import make_plan
from swift.train.run import train

SMALL = {"hidden_size": 64}
WIDE = {"hidden_size": 128, "num_layers": 4}
VOCAB = {"hidden_size": 64, "vocab_size": 8192}
BF16 = "--torch_dtype bfloat16"
RECOMPUTED = "--gradient_checkpointing true"
FULL = "--tuner_type full"
FOUR = "--per_device_train_batch_size 4"
PADDED = "--padding_free false"

CASES = {
    # activations and logits
    "lora": (WIDE, 100, FOUR),
    "lora, padded": (WIDE, 100, f"{FOUR} {PADDED}"),
    "lora without dropout": (WIDE, 200, f"{FOUR} --lora_dropout 0"),
    "lora in bfloat16": (WIDE, 100, f"{FOUR} {BF16}"),
    "lora, packed": (WIDE, 100, "--packing true --per_device_train_batch_size 2"),
    "lora, recomputed": (WIDE, 250, f"{FOUR} {RECOMPUTED}"),
    "lora, recomputed in bfloat16": (WIDE, 250, f"{FOUR} {RECOMPUTED} {BF16}"),
    "lora, half of the layers recomputed": (WIDE, 100, f"{FOUR} {RECOMPUTED} --recompute_num_layers 2"),
    "lora, many logits": (VOCAB, 250, FOUR),
    "lora, many logits in bfloat16": (VOCAB, 250, f"{FOUR} {BF16}"),
    "lora, small chunks": (VOCAB, 250, f"{FOUR} --logits_chunk_size 128"),
    "full, many logits": (VOCAB, 250, f"{FOUR} {FULL}"),
    "full": (WIDE, 200, f"{FOUR} {FULL}"),
    "full in bfloat16": (WIDE, 200, f"{FOUR} {FULL} {BF16}"),
    "full, recomputed in bfloat16": (WIDE, 200, f"{FOUR} {FULL} {BF16} {RECOMPUTED}"),
    "llama": ({**WIDE, "architecture": "llama"}, 100, FOUR),
    "mixture of experts": ({**WIDE, "architecture": "qwen3_moe"}, 100, f"{FOUR} {FULL}"),
    # weights, gradients, optimizer
    "full, short rows": (WIDE, 16, FULL),
    "full, no accumulation": (WIDE, 16, f"{FULL} --gradient_accumulation_steps 1"),
    "full, weights in bfloat16": (WIDE, 16, f"{FULL} {BF16} --param_dtype bfloat16"),
    "full, 8-bit AdamW": (WIDE, 16, f"{FULL} --optim adamw_8bit"),
    "full, GaLore": (WIDE, 16, f"{FULL} --optim galore_adamw --galore_rank 8"),
    "full, Muon": (WIDE, 16, f"{FULL} --optim muon"),
    "QLoRA": (WIDE, 16, "--quantization_bit 4 --lora_rank 16"),
    "lora, short rows": (WIDE, 16, "--lora_rank 32"),
    "lora, small model": (SMALL, 16, "--lora_rank 4"),
    "llama, full": ({**WIDE, "architecture": "llama"}, 16, FULL),
}  # fmt: skip


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Name of a case -> relative errors of (formula, trace)."""
    home = tmp_path_factory.mktemp("memory")
    models = {}

    def run(name):
        shape, length, flags = CASES[name]
        key = json.dumps(shape)
        if key not in models:
            models[key] = make_tiny_model(home / f"model-{len(models)}", **shape)
        data = home / f"rows-{length}.jsonl"
        text = " ".join("abcdefghij"[number % 10] for number in range(2 * length))
        data.write_text((json.dumps({"text": text}) + "\n") * 16)
        words = f"--model {models[key]} --dataset {data} --device cpu --max_length {length} --max_steps 2"
        words += f" --truncation_strategy right --split_dataset_ratio 0 --save_strategy no --output_dir {home / 'out'}"
        if "accumulation" not in flags:
            words += " --gradient_accumulation_steps 2"
        argv = [*words.split(), *flags.split()]
        with LiveTensors() as counter:
            peak = PeakOfSteps(counter)
            train(resolve("pt", argv), callbacks=[peak], say=lambda text: None)
        errors = []
        for method in (None, traced):
            parts = make_plan(resolve("pt", argv, planning=True), exact=method).memory["parts"]
            estimate = sum(size for part, size in parts.items() if part not in ("context", "reserve"))
            errors.append(estimate / peak.bytes - 1)
        return errors

    return run


def test_median_and_tail_of_the_errors(measure, monkeypatch, tmp_path):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    found = {name: measure(name) for name in CASES}
    assert len(found) >= 24
    table = "\n".join(f"{name:36} {formula:+7.1%} {trace:+7.1%}" for name, (formula, trace) in found.items())
    print(table)
    for method in (0, 1):
        errors = sorted(abs(pair[method]) for pair in found.values())
        assert statistics.median(errors) <= 0.03, table
        assert errors[int(0.95 * len(errors))] <= 0.08, table
