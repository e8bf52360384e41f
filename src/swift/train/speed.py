"""How fast this machine trains: passes of small models with random weights, on the real training path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from swift.config.bind import resolve
from swift.core.devices import pick_device
from swift.core.logging import quiet_libraries
from swift.data.collate import Batch
from swift.models.load import choose_attention
from swift.train.assemble import make_engine, make_objective, tune_model

__all__ = ["PROBE_RANK", "pass_seconds"]

PROBE_RANK = 8
TRIALS = 3


def pass_seconds(config: dict[str, Any], tokens: int, device: str, dtype: str) -> float:
    """Seconds of a forward and backward pass over one row, with LoRA on all linear layers: the least of a few.

    Args:
        config: contents of config.json of a small model, with ``architectures``.
        tokens: of the row, all of them targets.
    """
    import transformers

    quiet_libraries()
    values = {"lora_rank": PROBE_RANK, "lora_dropout": 0.0, "gradient_checkpointing": False}
    resolved = resolve("sft", values=values, partial=True)
    place, precision = pick_device(device), getattr(torch, dtype)
    model_class = getattr(transformers, config["architectures"][0])
    settings = model_class.config_class.from_dict(config)
    attention = choose_attention("auto", settings, Path())
    with torch.random.fork_rng():
        model = model_class._from_config(settings, dtype=precision, attn_implementation=attention)
        tuned = tune_model(model.to(place), resolved, device=place, dtype=precision, total_steps=1, base=None)
        engine = make_engine(tuned, resolved, device=place, dtype=precision, total_steps=1, tokenizer=None)
        ids = torch.arange(tokens)[None] % config["vocab_size"]
        batch = Batch(
            input_ids=ids,
            position_ids=torch.arange(tokens)[None],
            targets=ids,
            weights=None,
            document_lengths=None,
            num_tokens=tokens,
            num_targets=tokens,
            sample_ids=[0],
            samples_per_row=[1],
        )
        objective = make_objective(resolved, validation=False)
        seconds = []
        for _ in range(TRIALS + 1):
            _wait(place)
            start = time.perf_counter()
            engine.forward_backward([batch], objective)
            _wait(place)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
