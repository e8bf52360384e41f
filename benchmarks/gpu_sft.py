"""Training speed on a CUDA device: Qwen3-0.6B- and 4B-shaped random weights, beside TRL in the same run.

    python benchmarks/gpu_sft.py [--shapes 0.6b 4b] [--methods lora full] [--peak_tflops 989]

Every row of a batch is one document of exactly 4,096 tokens, all of them learned, so both sides do the same work and
no side profits from padding or from leaking attention. bfloat16 compute; full training keeps float32 weights; sdpa
attention; no gradient checkpointing. Speed is taken between the end of step 5 and the last step, each after a device
synchronisation.

Model FLOPs utilisation = tokens per second x FLOPs per token / peak, where FLOPs per token are

    full: 6 P + 6 L A T        LoRA: 4 P + 6 L A T + 6 R

P: parameters of all matrices that tokens are multiplied with (the output matrix included, the embedding not);
L: layers; A: heads x head size; T: 4,096 (causal attention: half of the pairs); R: LoRA parameters. With LoRA the
frozen matrices need no weight gradient: 4 P instead of 6 P. Recomputation counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_work import make_tokenizer, tokenizer_corpus
from measure import HERE, described_parser, markdown_table, write_results
from settings import option_words

LENGTH = 4096
NUM_DOCUMENTS = 64
WARM_UP_STEPS = 5
SEED = 42
LORA_RANK = 16
SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
COMMON_SHAPE = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
}
BATCH_SIZE = {"0.6b": 4, "4b": 2}
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}


def make_model(folder: Path, shape: str) -> None:
    """Random bfloat16 weights of a shape, with the tokenizer of ``make_work.py``."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ids = make_tokenizer(folder)
    config = Qwen3Config(
        **SHAPES[shape],
        **COMMON_SHAPE,
        rope_theta=1e6,
        tie_word_embeddings=True,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def make_documents(path: Path, model: Path) -> None:
    """Texts of exactly LENGTH tokens (the last token of each is the end token that both sides add)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n".join(tokenizer_corpus()), add_special_tokens=False)["input_ids"]
    lines: list[str] = []
    start = 0
    while len(lines) < NUM_DOCUMENTS:
        # Longer than LENGTH by a margin: cutting on the right then gives the same length on both sides.
        text = tokenizer.decode(ids[start : start + LENGTH + 64])
        lines.append(json.dumps({"text": text}) + "\n")
        start += LENGTH
    path.write_text("".join(lines), encoding="utf-8")


def num_matrix_parameters(shape: str) -> int:
    """P of the formula above."""
    size, common = SHAPES[shape], COMMON_SHAPE
    hidden, attention = size["hidden_size"], size["num_attention_heads"] * common["head_dim"]
    key_value = common["num_key_value_heads"] * common["head_dim"]
    layer = 2 * hidden * attention + 2 * hidden * key_value + 3 * hidden * size["intermediate_size"]
    return size["num_hidden_layers"] * layer + hidden * common["vocab_size"]


def num_lora_parameters(shape: str) -> int:
    """R of the formula above: LORA_RANK x (inputs + outputs) of every linear layer but the head."""
    size, common = SHAPES[shape], COMMON_SHAPE
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    attention = size["num_attention_heads"] * common["head_dim"]
    key_value = common["num_key_value_heads"] * common["head_dim"]
    layer = 2 * (hidden + attention) + 2 * (hidden + key_value) + 3 * (hidden + inner)
    return LORA_RANK * size["num_hidden_layers"] * layer


def flops_per_token(shape: str, method: str) -> float:
    size = SHAPES[shape]
    attention = (
        6 * size["num_hidden_layers"] * size["num_attention_heads"] * COMMON_SHAPE["head_dim"] * LENGTH
    )
    if method == "full":
        return 6 * num_matrix_parameters(shape) + attention
    return 4 * num_matrix_parameters(shape) + attention + 6 * num_lora_parameters(shape)


def swift_command(model: Path, data: Path, out: Path, shape: str, method: str, steps: int) -> list[str]:
    options: dict[str, Any] = {
        "model": model,
        "dataset": data,
        "output_dir": out.parent,
        "run_name": out.name,
        "tuner_type": method,
        "torch_dtype": "bfloat16",
        "attn_impl": "sdpa",
        "max_length": LENGTH,
        "truncation_strategy": "right",
        "per_device_train_batch_size": BATCH_SIZE[shape],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "learning_rate": LEARNING_RATE[method],
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "seed": SEED,
        "logging_steps": steps,
        "save_strategy": "no",
        "save_only_model": "true",
        "callbacks": HERE / "record_gpu.py",
    }
    if method == "lora":
        options |= {"lora_rank": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "lora_dropout": 0}
    return [sys.executable, "-m", "swift.cli.main", "pt", *option_words(options)]


def train_with_trl(model: str, data: str, out: Path, shape: str, method: str, steps: int) -> None:
    """TRL's side, in a process of its own."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from record_gpu import write_mark
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write_mark(out, state.global_step, state.global_step * BATCH_SIZE[shape] * LENGTH)

    out.mkdir(parents=True, exist_ok=True)
    config = SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE[shape],
        learning_rate=LEARNING_RATE[method],
        lr_scheduler_type="constant",
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=True,
        seed=SEED,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps,
        model_init_kwargs={
            "dtype": torch.bfloat16 if method == "lora" else torch.float32,
            "attn_implementation": "sdpa",
        },
    )
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset("json", data_files=data, split="train", cache_dir=str(out / "cache")),
        peft_config=lora if method == "lora" else None,
        callbacks=[Marks()],
    )
    shortest = min(len(row["input_ids"]) for row in trainer.train_dataset)
    if shortest != LENGTH:
        raise SystemExit(f"error: a document has {shortest} tokens, not {LENGTH}")
    trainer.train()


def measure(command: list[str], out: Path) -> dict[str, float]:
    """Run a side; tokens per second and peak memory from its marks."""
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}\n{tail}")
    marks = [json.loads(line) for line in (out / "marks.jsonl").read_text().splitlines()]
    first, last = marks[WARM_UP_STEPS - 1], marks[-1]
    return {
        "tokens_per_second": (last["num_tokens"] - first["num_tokens"])
        / (last["seconds"] - first["seconds"]),
        "peak_memory_bytes": last["peak_memory_bytes"],
    }


def measure_all(shapes: list[str], methods: list[str], steps: int, rounds: int, peak_tflops: float) -> None:
    rows, values = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes:
            folder = Path(temporary) / shape
            model, data = folder / "model", folder / "documents.jsonl"
            make_model(model, shape)
            make_documents(data, model)
            for method in methods:
                for number in range(rounds):
                    for side in ("trl", "swift"):
                        out = folder / f"{method}-{side}-{number}"
                        command = swift_command(model, data, out, shape, method, steps)
                        if side == "trl":
                            parts = [str(model), str(data), str(out), shape, method, str(steps)]
                            command = [sys.executable, __file__, "--trl", *parts]
                        figures = measure(command, out)
                        rate = figures["tokens_per_second"]
                        mfu = rate * flops_per_token(shape, method) / (peak_tflops * 1e12)
                        memory = figures["peak_memory_bytes"] / 2**30
                        rows.append([shape, method, side, f"{rate:,.0f}", f"{mfu:.1%}", f"{memory:.1f} GiB"])
                        values.append({"shape": shape, "method": method, "side": side, "mfu": mfu, **figures})
                        print(" ".join(rows[-1]), flush=True)
    import torch

    header = ["shape", "method", "side", "tokens per second", "MFU", "peak memory"]
    device = torch.cuda.get_device_name()
    text = (
        f"# Training on {device}\n\nRows of {LENGTH} tokens, bfloat16, {steps} steps; MFU against {peak_tflops:g} dense"
        " bfloat16 TFLOPS, formula in `gpu_sft.py`.\n\n"
    )
    write_results(
        "gpu_sft",
        text + markdown_table(header, rows),
        {"device": device, "peak_tflops": peak_tflops, "runs": values},
    )


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATE), default=list(LEARNING_RATE))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--peak_tflops", type=float, default=989.0, help="dense bfloat16 peak (989: H100, H200)"
    )
    parser.add_argument("--trl", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "error: this measurement needs a CUDA device\n  fix: benchmarks/sft_vs_trl.py runs on a CPU"
        )
    if arguments.trl:
        model, data, out, shape, method, steps = arguments.trl
        train_with_trl(model, data, Path(out), shape, method, int(steps))
    else:
        measure_all(
            arguments.shapes, arguments.methods, arguments.steps, arguments.rounds, arguments.peak_tflops
        )


if __name__ == "__main__":
    main()
