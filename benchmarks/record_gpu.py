"""A callback for `swift`: time, tokens and peak device memory after each step, in ``marks.jsonl`` of the run folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from swift.train.callbacks.base import Callback, RunView


def write_mark(folder: Path, step: int, num_tokens: int) -> None:
    """Wait for the device, then append one line to ``folder/marks.jsonl``."""
    torch.cuda.synchronize()
    mark = {
        "step": step,
        "seconds": time.perf_counter(),
        "num_tokens": num_tokens,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    with (folder / "marks.jsonl").open("a") as file:
        file.write(json.dumps(mark) + "\n")


class RecordGpu(Callback):
    def on_step_end(self, run: RunView) -> None:
        write_mark(run.folder.path, run.state.step, run.state.num_tokens)
