"""Quantises a tiny random model to FP8, loads it again, and measures how far its logits moved."""

import tempfile
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_model import distance, make_model
from transformers import AutoModelForCausalLM


def main(payload: dict) -> dict:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        source, target = Path(scratch) / "source", Path(scratch) / "fp8"
        ids = torch.arange(3, 67)[None]
        before = make_model(source)(ids).logits
        recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
        oneshot(model=str(source), recipe=recipe, output_dir=str(target))
        after = AutoModelForCausalLM.from_pretrained(target, dtype="float32")(ids).logits
    return {"scheme": "FP8_DYNAMIC", "logits_moved": distance(after, before, 0.2)}
