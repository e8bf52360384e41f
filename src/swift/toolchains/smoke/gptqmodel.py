"""Quantises a tiny random model to 4 bits with GPTQ, loads it again, and measures how far its logits moved."""

import json
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tiny_model import WORDS, distance, make_model


def main(payload: dict) -> dict:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "gptq"
        ids = torch.arange(3, 67)[None]
        with torch.no_grad():
            before = make_model(source)(ids).logits
        rows = [
            {"input_ids": torch.randint(3, WORDS, (64,)).tolist(), "attention_mask": [1] * 64}
            for _ in range(8)
        ]
        model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=32), device="cpu")
        model.quantize(rows, batch_size=2)
        model.save(str(target))
        method = json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"]
        again = GPTQModel.load(str(target), device="cpu", backend=BACKEND.TORCH)
        with torch.no_grad():
            after = again.model(ids).logits
    return {"method": method, "bits": 4, "logits_moved": distance(after, before, 0.5)}
