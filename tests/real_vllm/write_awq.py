"""Runs in the toolchain gptqmodel: writes a model in AWQ's format."""

import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main(payload: dict) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [
        {"input_ids": torch.randint(3, 400, (128,)).tolist(), "attention_mask": [1] * 128} for _ in range(16)
    ]
    config = QuantizeConfig(bits=4, group_size=64, quant_method="awq", format="gemm")
    model = GPTQModel.load(payload["model"], config, device="cpu")
    model.quantize(rows, batch_size=4)
    model.save(payload["output"])
    return {"output": payload["output"]}
