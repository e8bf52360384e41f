#!/usr/bin/env python3
"""What each way of quantising costs, on a small model trained here on real text.

    python benchmarks/quantise.py [--work FOLDER] [--methods bnb-4 gptq-4 ...]

The text is the documentation and the sources of Python's standard library. `swift pt` trains a Llama of 0.7M parameters
on it (a few CPU-minutes; kept in the work folder), `swift export` quantises it with each method, calibrated on training
rows, and the perplexity of held-out text, which neither saw, is that of the parity reports. Plain rounding to nearest
(4 bits, groups of 128, no data) is the reference: symmetric as GPTQ stores it here, with zero points as AWQ does. The
methods whose toolchains are not installed are left out, by name. Writes ``results/quantise.json`` and ``.md``.
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
NAMES = {"bnb-4": "bitsandbytes NF4", "bnb-8": "bitsandbytes int8", "gptq-4": "GPTQ, 4 bits", "awq-4": "AWQ, 4 bits",
         "fp8": "FP8 (W8A8, dynamic)", "w8a8": "W8A8 int8"}  # fmt: skip
GROUP, PARITY_TOKENS, CHUNK, EVERY = 128, 32_768, 1500, 12
AWQ_ROWS = 32
FORMS = ("{:.4f}", "{:+.3%}", "{:.2e}", "{:.2%}")
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


def train(folder: Path) -> Path:
    """The trained model; what an earlier call left is taken."""
    from swift.models.tiny import make_tiny_model

    model = folder / "run" / "model" / "last"
    if not model.exists():
        make_data(folder)
        sizes = {"intermediate_size": 384, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        make_tiny_model(
            folder / "start", texts=texts(), vocab_size=384, hidden_size=128, num_layers=3, architecture="llama",
            max_position_embeddings=512, config=sizes,
        )  # fmt: skip
        options = {
            "model": folder / "start",
            "dataset": folder / "train.jsonl",
            "device": "cpu",
            "tuner_type": "full",
            "output_dir": folder / "run",
            "run_name": "model",
            "save_only_model": "true",
            "logging_steps": 50,
            "max_length": 256,
            "truncation_strategy": "split",
            "packing": "true",
            "max_steps": 1000,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 4e-3,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "warmup_ratio": 0.05,
            "min_lr_ratio": 0.1,
        }
        if run(["pt", *option_words(options)], folder, "train"):
            raise SystemExit((folder / "train.log").read_text()[-2000:])
    return model


def export(model: Path, folder: Path, name: str) -> dict[str, Any]:
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
            folder / "heldout.jsonl",
            "--parity_tokens",
            PARITY_TOKENS,
            "--device",
            "cpu",
        ]
        if method == "awq":  # it computes in float16, which takes a CPU many times as long
            words += ["--quant_n_samples", AWQ_ROWS]
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
def reference(model_folder: Path, folder: Path, symmetric: bool) -> dict[str, Any]:
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
        str(folder / "heldout.jsonl"),
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
    parser.add_argument("--work", type=Path, help="keeps model and exports; default: a temporary folder")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as text:
        folder = (arguments.work or Path(text)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        model = train(folder)
        reports = {
            "rtn": reference(model, folder, True),
            "rtn-zero": reference(model, folder, False),
        }
        missing = [name for name in arguments.methods if not installed(name)]
        for name in arguments.methods:
            if name not in missing:
                reports[name] = export(model, folder, name)
                print(name, reports[name]["difference"]["perplexity_increase"], flush=True)
        write(reports, missing)


def write(reports: dict[str, dict[str, Any]], missing: list[str]) -> None:
    names = {"rtn": "round to nearest, symmetric", "rtn-zero": "round to nearest, zero points", **NAMES}
    increase = {name: report["difference"]["perplexity_increase"] for name, report in reports.items()}
    share = {"gptq-4": "rtn", "awq-4": "rtn-zero"}
    shares = {name: increase[name] / increase[of] for name, of in share.items() if name in increase}
    kl = {name: report["difference"]["kl"] for name, report in reports.items()}
    kl_shares = {name: kl[name] / kl[of] for name, of in share.items() if name in kl}
    rows = []
    for name, report in reports.items():
        found = report["difference"]
        size = f"{report['bytes_before'] / report['bytes_after']:.2f}x" if "bytes_after" in report else "-"
        of = (
            f"{shares[name]:.0%} (KL: {kl_shares[name]:.0%}) of {names[share[name]]}"
            if name in shares
            else "-"
        )
        figures = (found["perplexity_after"], found["perplexity_increase"], found["kl"], found["same_choice"])
        after, more, nats, same = (form.format(value) for form, value in zip(FORMS, figures, strict=True))
        rows.append([names[name], after, more, of, nats, same, size])
    before = reports["rtn"]["difference"]
    lines = [
        "# What quantising costs\n",
        f"A Llama of 0.7M parameters, trained by `swift pt` on the standard library's documentation and sources;"
        f" held-out text of {before['num_positions']:,} tokens; perplexity before: {before['perplexity_before']:.4f}."
        f" Groups of {GROUP}; embedding and head in full precision (so a model this small shrinks little).\n",
        markdown_table(
            ["method", "perplexity", "increase", "share of the loss", "KL (nats)", "same choice", "smaller"],
            rows,
        ),
        *_goals(shares, increase),
        _channels(reports["rtn"]["largest_to_median_channel"]),
    ]
    if missing:
        lines.append(f"Left out, their toolchains are not installed: {', '.join(missing)}.\n")
    write_results(
        "quantise",
        "\n".join(lines),
        {"reports": reports, "shares": shares, "kl_shares": kl_shares, "missing": missing},
    )


def _goals(shares: dict[str, float], increase: dict[str, float]) -> Iterator[str]:
    """Each aim and whether it is reached, one sentence a line."""
    eight = {name: increase[name] for name in ("fp8", "w8a8") if name in increase}
    for aim, found, limit, form in (
        ("lose at most 60 % of what rounding to nearest loses", shares, 0.6, "{:.0%}"),
        ("add at most 0.5 % of perplexity", eight, 0.005, "{:+.3%}"),
    ):
        for name, value in found.items():
            verdict = "reached" if value <= limit else "NOT reached"
            yield f"- {NAMES[name]}: the aim is to {aim}: {form.format(value)}, {verdict}."
    yield ""


def _channels(uneven: dict[str, float]) -> str:
    """Why AWQ has little to win here."""
    return (
        "AWQ (arXiv 2306.00978) protects the input channels that are far larger than the others. Here the largest is"
        f" {min(uneven.values()):.1f} to {max(uneven.values()):.1f} times the median of its layer: there is little to"
        " protect.\n"
    )


if __name__ == "__main__":
    main()
