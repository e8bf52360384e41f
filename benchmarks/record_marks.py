"""A callback for `swift sft`: CPU seconds and tokens after each step, in ``marks.jsonl`` of the run folder."""

from __future__ import annotations

import json
import resource

from swift.train.callbacks.base import Callback, RunView


class RecordMarks(Callback):
    def on_step_end(self, run: RunView) -> None:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        mark = {
            "step": run.state.step,
            "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
            "num_tokens": run.state.num_tokens,
        }
        with (run.folder.path / "marks.jsonl").open("a") as file:
            file.write(json.dumps(mark) + "\n")
