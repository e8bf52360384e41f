"""Mean loss per assistant token of a PEFT adapter on held-out rows: ``python heldout_loss.py MODEL ADAPTER DATA``.

Computed by transformers and peft alone, one row at a time, so that it favours nobody. Prints one number.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()

    import torch
    from bare_loop import IGNORE, tokenize
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    loss_sum, num_targets = 0.0, 0
    with torch.inference_mode():
        for ids, labels in tokenize(arguments.model, arguments.data):
            targets = torch.tensor(labels[1:])
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss_sum += cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
            num_targets += int((targets != IGNORE).sum())
    print(loss_sum / num_targets)


if __name__ == "__main__":
    main()
