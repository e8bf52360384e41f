#!/usr/bin/env python3
"""What each way of quantising costs, on small models trained here on real text.

    python benchmarks/quantise.py [--work FOLDER] [--models small long wide] [--methods bnb-4 gptq-4 ...]

The text is the documentation and the sources of Python's standard library. `swift pt` trains three Llamas on it: one
of 0.6M parameters for 1,000 steps, the same for 6,000, and one of 3.5M for 500 (two to twelve CPU-minutes each; kept in
the work folder). `swift export` quantises them with each method, calibrated on training rows, and the perplexity of
held-out text, which neither saw, is that of the parity reports. Plain rounding to nearest (4 bits, groups of 128, no
data) is the reference: symmetric as GPTQ stores it here, with zero points as AWQ does. The methods whose toolchains are
not installed are left out, by name. Writes ``results/quantise.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import markdown_table, one_thread, write_results
from settings import option_words

METHODS = {
    "bnb-4": ("bnb", 4, None),
    "bnb-8": ("bnb", 8, None),
    "gptq-4": ("gptq", 4, "gptqmodel"),
    "awq-4": ("awq", 4, "gptqmodel"),
    "fp8": ("fp8", 8, "llmcompressor"),
    "w8a8": ("w8a8", 8, "llmcompressor"),
}
REFERENCE = {"gptq-4": "rtn", "awq-4": "rtn-zero"}
NAMES = {
    "rtn": "round to nearest, symmetric",
    "rtn-zero": "round to nearest, zero points",
    "bnb-4": "bitsandbytes NF4",
    "bnb-8": "bitsandbytes int8",
    "gptq-4": "GPTQ, 4 bits",
    "awq-4": "AWQ, 4 bits",
    "fp8": "FP8 (W8A8, dynamic)",
    "w8a8": "W8A8 int8",
}


@dataclass(frozen=True)
class Size:
    """One of the models, how long it is trained, and on how many rows AWQ is calibrated.

    AWQ computes in float16, at which a CPU is six times as slow as in float32.
    """

    width: int
    layers: int
    inner: int
    heads: int
    key_value_heads: int
    steps: int
    learning_rate: float
    awq_rows: int


MODELS = {
    "small": Size(128, 3, 384, 4, 2, steps=1000, learning_rate=4e-3, awq_rows=32),
    "long": Size(128, 3, 384, 4, 2, steps=6000, learning_rate=4e-3, awq_rows=32),
    # As in the models of AWQ's paper each head has keys and values of its own, so that o_proj is scaled, too.
    "wide": Size(256, 4, 768, 8, 8, steps=500, learning_rate=3e-3, awq_rows=8),
}
GROUP, PARITY_TOKENS, CHUNK, EVERY = 128, 32_768, 1500, 12
MODULES = (
    "argparse asyncio.events collections datetime decimal difflib email.message functools inspect json.decoder logging"
    " pathlib pickle random shutil socket statistics string subprocess tarfile textwrap threading typing unittest.case"
    " urllib.parse zipfile"
).split()


def texts() -> list[str]:
    from pydoc_data.topics import topics

    whole = [topics[name] for name in sorted(topics)]
    return whole + [inspect.getsource(importlib.import_module(name)) for name in MODULES]


def make_data(folder: Path) -> None:
    """train.jsonl and heldout.jsonl: pieces of 1,500 characters, every twelfth one held out."""
    pieces = [text[start : start + CHUNK] for text in texts() for start in range(0, len(text), CHUNK)]
    for name, wanted in (("train", False), ("heldout", True)):
        rows = [
            json.dumps({"text": piece})
            for number, piece in enumerate(pieces)
            if (number % EVERY == 0) == wanted
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def run(words: list[str], folder: Path, name: str) -> int:
    """``swift`` with these words; its exit code (1: past a limit)."""
    log = folder / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "swift.cli.main", *words], env=environment(), stdout=file, stderr=file
        )
    if done.returncode > 1:
        raise SystemExit(f"error: swift {' '.join(words)}\n{log.read_text()[-2000:]}")
    return done.returncode


def environment() -> dict[str, str]:
    variables = one_thread()
    variables["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    return variables


def train(folder: Path, data: Path, size: Size) -> Path:
    """The trained model in ``folder``, on the texts in ``data``; what an earlier call left is taken."""
    from swift.models.tiny import make_tiny_model

    model = folder / "run" / "model" / "last"
    if not model.exists():
        folder.mkdir(exist_ok=True)
        config = {
            "intermediate_size": size.inner,
            "head_dim": 32,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
        }
        make_tiny_model(
            folder / "start", texts=texts(), vocab_size=384, hidden_size=size.width, num_layers=size.layers,
            architecture="llama", max_position_embeddings=512, config=config,
        )  # fmt: skip
        options = {
            "model": folder / "start",
            "dataset": data / "train.jsonl",
            "device": "cpu",
            "tuner_type": "full",
            "output_dir": folder / "run",
            "run_name": "model",
            "save_only_model": "true",
            "logging_steps": 50,
            "max_length": 256,
            "truncation_strategy": "split",
            "packing": "true",
            "max_steps": size.steps,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": size.learning_rate,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "warmup_ratio": 0.05,
            "min_lr_ratio": 0.1,
        }
        if run(["pt", *option_words(options)], folder, "train"):
            raise SystemExit((folder / "train.log").read_text()[-2000:])
    return model


def export(model: Path, folder: Path, held_out: Path, name: str, awq_rows: int) -> dict[str, Any]:
    """The parity report of a method."""
    method, bits, _ = METHODS[name]
    output = folder / name
    if not (output / "parity.json").exists():
        words = [
            "export",
            "--model",
            model,
            "--quant_method",
            method,
            "--quant_bits",
            bits,
            "--output_dir",
            output,
        ]
        words += [
            "--parity_dataset",
            held_out,
            "--parity_tokens",
            PARITY_TOKENS,
            "--device",
            "cpu",
        ]
        if method == "awq":
            words += ["--quant_n_samples", awq_rows]
        run([str(word) for word in words], folder, name)
    if not (output / "parity.json").exists():
        raise SystemExit(f"error: {name} was not exported\n{(folder / f'{name}.log').read_text()[-2000:]}")
    report: dict[str, Any] = json.loads((output / "parity.json").read_text())
    return report


def round_to_nearest(weight: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """``weight [out, in]`` as 4 bits in groups of 128 along the inputs, and back."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        return ((groups / scale).round().clamp(-8, 7) * scale).reshape_as(weight)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape_as(weight)


@torch.no_grad()
def reference(model_folder: Path, held_out: Path, symmetric: bool) -> dict[str, Any]:
    """The same report of rounding to nearest, on the same held-out tokens."""
    from swift.config.bind import resolve
    from swift.inference.context import find_context
    from swift.models.compare import compare, model_logits
    from swift.models.load import load_model
    from swift.quantize.texts import held_out_probes, read_template

    words = [
        "--model",
        str(model_folder),
        "--parity_dataset",
        str(held_out),
        "--quant_method",
        "bnb",
    ]
    resolved = resolve("export", [*words, "--parity_tokens", str(PARITY_TOKENS)])
    context = find_context(resolved)
    probes, _ = held_out_probes(resolved, context, read_template(resolved, context))
    original = load_model(model_folder, dtype=torch.float32)
    rounded = load_model(model_folder, dtype=torch.float32)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(round_to_nearest(module.weight, symmetric))
    sums = watch_channels(original)
    difference = compare(model_logits(original, probes), model_logits(rounded, probes), probes).to_dict()
    return {
        "difference": difference,
        "largest_to_median_channel": {n: float(s.max() / s.median()) for n, s in sums.items()},
    }


def watch_channels(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Filled as the model runs: linear layer -> sums of the magnitude of each input channel, which AWQ goes by."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].abs().flatten(0, -2).sum(0)

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            watch(name, module)
    return sums


def installed(name: str) -> bool:
    from swift.toolchains.toolchain import ToolchainError, find_toolchain

    toolchain = METHODS[name][2]
    try:
        return toolchain is None or bool(find_toolchain(toolchain))
    except ToolchainError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, help="keeps models and exports; default: a temporary folder")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    missing = [name for name in arguments.methods if not installed(name)]
    methods = [name for name in arguments.methods if name not in missing]
    with tempfile.TemporaryDirectory() as text:
        work = (arguments.work or Path(text)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "heldout.jsonl").exists():
            make_data(work)
        measured = {name: measure(work, name, methods) for name in arguments.models}
    write(measured, missing)


def measure(work: Path, name: str, methods: list[str]) -> dict[str, Any]:
    """All of one model: its size and the report of each method."""
    from swift.models.facts import ModelFacts

    folder, held_out = work / name, work / "heldout.jsonl"
    model = train(folder, work, MODELS[name])
    reports = {"rtn": reference(model, held_out, True), "rtn-zero": reference(model, held_out, False)}
    for method in methods:
        reports[method] = export(model, folder, held_out, method, MODELS[name].awq_rows)
        print(name, method, reports[method]["difference"]["perplexity_increase"], flush=True)
    reports = json.loads(json.dumps(reports).replace(f"{work}/", ""))
    return {"parameters": ModelFacts.read(model).num_parameters, "reports": reports, **_shares(reports)}


def _shares(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What a method loses as a share of what rounding in its form loses."""
    found: dict[str, dict[str, float]] = {}
    for key, figure in (("shares", "perplexity_increase"), ("kl_shares", "kl")):
        lost = {name: report["difference"][figure] for name, report in reports.items()}
        found[key] = {name: lost[name] / lost[of] for name, of in REFERENCE.items() if name in lost}
    return found


def write(measured: dict[str, dict[str, Any]], missing: list[str]) -> None:
    """The tables: the models beside each other."""
    lines = [
        "# What quantising costs\n",
        "Llamas trained by `swift pt` on the standard library's documentation and sources, and how much perplexity each"
        " method adds on held-out text. In brackets for 4 bits with data: the share of what rounding to nearest in the"
        f" same form adds, and of its KL divergence. Groups of {GROUP}; embedding and head in full precision."
        " Where rounding itself adds less than 0.1 % of perplexity, a share of it says nothing: compare KL"
        " divergences.\n",
    ]
    rows = []
    for method, name in NAMES.items():
        cells = [_cells(method, entry) for entry in measured.values()]
        if any(cells):
            rows.append([name, *(cell for one in cells for cell in (one or ["-"] * 3))])
    titles = [_title(name, entry) for name, entry in measured.items()]
    heads = [f"{title}{part}" for title in titles for part in (": increase", ": KL (nats)", ": same choice")]
    lines += [markdown_table(["method", *heads], rows), *_goals(measured)]
    lines += [_channels(titles, measured)]
    if missing:
        lines.append(f"Left out, their toolchains are not installed: {', '.join(missing)}.\n")
    write_results("quantise", "\n".join(lines), {"models": measured, "missing": missing})


def _title(name: str, entry: dict[str, Any]) -> str:
    before = entry["reports"]["rtn"]["difference"]["perplexity_before"]
    size = MODELS[name]
    return f"{entry['parameters'] / 1e6:.1f}M (width {size.width}, {size.steps:,} steps, perplexity {before:.2f})"


def _cells(method: str, entry: dict[str, Any]) -> list[str] | None:
    """Increase of perplexity with its share of rounding's, KL divergence, same choice; None: not measured."""
    if method not in entry["reports"]:
        return None
    found = entry["reports"][method]["difference"]
    increase = f"{found['perplexity_increase']:+.3%}"
    if method in entry["shares"]:
        increase += f" ({entry['shares'][method]:.0%}; KL {entry['kl_shares'][method]:.0%})"
    return [increase, f"{found['kl']:.2e}", f"{found['same_choice']:.2%}"]


def _goals(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Each aim and whether it is reached, one sentence a line."""
    for method in ("gptq-4", "awq-4", "fp8", "w8a8"):
        aim, limit, form = (
            ("lose at most 60 % of what rounding to nearest loses", 0.6, "{:.0%}")
            if method in REFERENCE
            else ("add at most 0.5 % of perplexity", 0.005, "{:+.3%}")
        )
        said = []
        for name, entry in measured.items():
            increase = entry["reports"].get(method, {}).get("difference", {}).get("perplexity_increase")
            if increase is not None:
                value = entry["shares"].get(method, increase)
                said.append(f"{name} {form.format(value)}, {'reached' if value <= limit else 'NOT reached'}")
        if said:
            yield f"- {NAMES[method]}: the aim is to {aim}: {'; '.join(said)}."
    yield ""


def _channels(titles: list[str], measured: dict[str, dict[str, Any]]) -> str:
    """What AWQ has to win."""
    spans = []
    for title, entry in zip(titles, measured.values(), strict=True):
        uneven = entry["reports"]["rtn"]["largest_to_median_channel"].values()
        spans.append(f"{min(uneven):.1f} to {max(uneven):.1f} in the model of {title.partition(' ')[0]}")
    return (
        "AWQ (arXiv 2306.00978) protects the input channels that are far larger than the others. Here the largest is"
        f" so many times the median of its layer: {', '.join(spans)}.\n"
    )


if __name__ == "__main__":
    main()
