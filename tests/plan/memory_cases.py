"""Tiny trainings whose memory is estimated and counted (``live_tensors.py``), for tests and for benchmarks.

Name -> (model, length, flags). Half of them are dominated by activations or logits.
"""

import json

from live_tensors import LiveTensors, PeakOfSteps

from swift.cli.plan import traced
from swift.config.bind import resolve
from swift.models.tiny import make_tiny_model
from swift.plan.plan import make_plan
from swift.rl.run import train

SMALL = {"hidden_size": 64}
WIDE = {"hidden_size": 128, "num_layers": 4}
VOCAB = {"hidden_size": 64, "vocab_size": 8192}
BF16 = "--torch_dtype bfloat16"
RECOMPUTED = "--gradient_checkpointing true"
FULL = "--tuner_type full"
FOUR = "--per_device_train_batch_size 4"
PADDED = "--padding_free false"
DPO = "--rlhf_type dpo"
GRPO = (
    "--rlhf_type grpo --reward_funcs format --reward_num_proc 1 --per_device_train_batch_size 16 --num_generations 16 "
    "--generation_batch_size 64 --max_completion_length 6 --gradient_accumulation_steps 4"
)

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
    "lora in float16": (WIDE, 100, f"{FOUR} --torch_dtype float16"),
    "full in bfloat16": (WIDE, 200, f"{FOUR} {FULL} {BF16}"),
    "full, recomputed in bfloat16": (WIDE, 200, f"{FOUR} {FULL} {BF16} {RECOMPUTED}"),
    "llama": ({**WIDE, "architecture": "llama"}, 100, FOUR),
    "mixture of experts": ({**WIDE, "architecture": "qwen3_moe"}, 100, f"{FOUR} {FULL}"),
    "DPO": (WIDE, 120, f"{DPO} {FOUR}"),
    "DPO, padded, full": (WIDE, 120, f"{DPO} {FOUR} {FULL} {PADDED}"),
    "DPO, packed": (WIDE, 120, f"{DPO} --packing true --per_device_train_batch_size 2"),
    "SimPO, many logits": (VOCAB, 200, f"--rlhf_type simpo {FOUR}"),
    "KTO": (WIDE, 120, f"--rlhf_type kto {FOUR}"),
    "reward model, recomputed": (WIDE, 200, f"--rlhf_type rm {FOUR} {RECOMPUTED}"),
    "queries and values": (WIDE, 100, f"{FOUR} --target_modules q_proj v_proj"),
    "eager attention": (WIDE, 100, f"{FOUR} {PADDED} --attn_impl eager"),
    "DoRA": (WIDE, 100, f"{FOUR} --use_dora true"),
    "PiSSA": (WIDE, 100, f"{FOUR} --init_weights pissa"),
    "VeRA": (WIDE, 100, f"{FOUR} --tuner_type vera"),
    "OFT": (WIDE, 100, f"{FOUR} --tuner_type oft --oft_block_size 8"),
    "IA3": (WIDE, 100, f"{FOUR} --tuner_type ia3"),
    "LoHa": (WIDE, 100, f"{FOUR} --tuner_type loha"),
    "Bone": (WIDE, 100, f"{FOUR} --tuner_type bone"),
    "ReFT": (WIDE, 100, f"{FOUR} --tuner_type reft"),
    "bottleneck adapter": (WIDE, 100, f"{FOUR} --tuner_type adapter"),
    "LLaMA-Pro": (WIDE, 100, f"{FOUR} --tuner_type llamapro --llamapro_num_new_blocks 2"),
    "LISA": (WIDE, 100, f"{FOUR} {FULL} --lisa_activated_layers 1"),
    "half of the weights frozen": (WIDE, 100, f"{FOUR} {FULL} --freeze_parameters_ratio 0.5"),
    # weights, gradients, optimizer
    "full, short rows": (WIDE, 16, FULL),
    "full, no accumulation": (WIDE, 16, f"{FULL} --gradient_accumulation_steps 1"),
    "full, weights in bfloat16": (WIDE, 16, f"{FULL} {BF16} --param_dtype bfloat16"),
    "full, 8-bit AdamW": (WIDE, 16, f"{FULL} --optim adamw_8bit"),
    "full, GaLore": (WIDE, 16, f"{FULL} --optim galore_adamw --galore_rank 8"),
    "full, Muon": (WIDE, 16, f"{FULL} --optim muon"),
    "QLoRA": (WIDE, 16, "--quantization_bit 4 --lora_rank 16"),
    "lora, short rows": (WIDE, 16, "--lora_rank 32"),
    "lora on 8 bits": (WIDE, 100, f"{FOUR} --quant_method bnb --quant_bits 8"),
    "lora, small model": (SMALL, 16, "--lora_rank 4"),
    "DPO, full, short rows": (WIDE, 32, f"{DPO} {FULL}"),
    "DPO beside a reference model": (WIDE, 32, f"{DPO} --ref_model MODEL"),
    # sampling: keys and values, logits, the model cast or gathered
    "GRPO, cache": (WIDE, 250, GRPO),
    "GRPO, cache in bfloat16": (WIDE, 250, f"{GRPO} {BF16}"),
    "GRPO, full": (WIDE, 250, f"{GRPO} {FULL}"),
    "GRPO, full in bfloat16": (WIDE, 250, f"{GRPO} {FULL} {BF16}"),
    "GRPO, fewer at once": (WIDE, 250, f"{GRPO} --max_num_seqs 20"),
    "GRPO, many logits": (VOCAB, 20, f"{GRPO} --logits_chunk_size 32"),
    "llama, full": ({**WIDE, "architecture": "llama"}, 16, FULL),
}  # fmt: skip


def _rows(length, flags):
    """Sixteen rows whose texts are all longer than the length at which they are cut."""
    text = " ".join("abcdefghij"[number % 10] for number in range(2 * length))
    if "--rlhf_type" not in flags:
        return [{"text": text}] * 16
    if "grpo" in flags:
        return [{"messages": [{"role": "user", "content": text}]}] * 16
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": text}]
    if "kto" in flags:
        return [{"messages": turns, "label": number % 2 == 0} for number in range(16)]
    return [{"messages": turns, "rejected_response": text[::-1]}] * 16


def arguments(name, home):
    """(command, flags) of a case whose files are made in the folder ``home``."""
    shape, length, flags = CASES[name]
    model = home / f"model-{'-'.join(map(str, shape.values()))}"
    if not model.is_dir():
        make_tiny_model(model, **shape)
    command = "rlhf" if "--rlhf_type" in flags else "pt"
    data = home / f"rows-{list(CASES).index(name)}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(length, flags)))
    words = f"--model {model} --dataset {data} --device cpu --max_length {length} --max_steps 2 --save_strategy no"
    cut = "left" if "grpo" in flags else "right"  # a prompt ends where its answer begins
    words += f" --truncation_strategy {cut} --split_dataset_ratio 0 --output_dir {home / 'out'}"
    if "accumulation" not in flags:
        words += " --gradient_accumulation_steps 2"
    return command, [*words.split(), *flags.replace("MODEL", str(model)).split()]


def compare(name, home):
    """(bytes counted in a training, bytes by part of the formulas, bytes by part of the trace)."""
    command, argv = arguments(name, home)
    with LiveTensors() as counter:
        peak = PeakOfSteps(counter)
        train(resolve(command, argv), callbacks=[peak], say=lambda text: None)
    found = []
    for method in (None, traced):
        parts = make_plan(resolve(command, argv, planning=True), exact=method).memory["parts"]
        found.append({part: size for part, size in parts.items() if part not in ("context", "reserve")})
    return peak.bytes, *found
