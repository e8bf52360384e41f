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

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from beside_trl import Run, in_turn
from make_work import make_work
from measure import HERE, described_parser, markdown_table, median, run_child, write_results

VOCABULARY = 131_072
MEMORY_STEPS = 6


OPTIONS = {"rlhf_type": "dpo", "beta": 0.1}


def import_bytes(folder: Path) -> dict[str, int]:
    """Resident memory of a process that only imports what each side imports."""
    trl = [sys.executable, str(HERE / "trl_dpo.py"), "-", "-", str(folder / "imports"), "--imports"]
    code = "import torch, transformers, swift.train.run; from transformers import AutoTokenizer, Qwen3ForCausalLM"
    return {
        "TRL": run_child(trl, folder / "imports-trl.log").peak_rss_bytes,
        "swift": run_child([sys.executable, "-c", code], folder / "imports.log").peak_rss_bytes,
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


def tell(run: Run) -> str:
    steps = run.marks[-1].step
    seconds = f"{run.step_seconds:.3f} CPU-s a step" if steps > MEMORY_STEPS else f"{steps} steps"
    return f"{seconds}, peak {run.child.peak_rss_bytes / 2**20:.0f} MiB"


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
            "losses": [run.logged("loss") for run in runs],
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
    parser = described_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = make_work(folder)
        imports = import_bytes(folder)
        measure = partial(
            in_turn, "trl_dpo.py", OPTIONS, data=data / "dpo.jsonl", rounds=arguments.rounds, tell=tell
        )
        speed = measure(model=model, folder=folder / "speed", steps=arguments.steps)
        large = large_vocabulary(model, folder)
        memory = measure(model=large, folder=folder / "memory", steps=MEMORY_STEPS)
        report(speed, memory, imports, arguments.steps)


if __name__ == "__main__":
    main()
