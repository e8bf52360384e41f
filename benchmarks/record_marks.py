"""A callback for `swift sft`: CPU seconds and tokens after each step, in ``marks.jsonl`` of the run folder."""

from __future__ import annotations

from measure import write_mark

from swift.train.callbacks.base import Callback, RunView


class RecordMarks(Callback):
    def on_step_end(self, run: RunView) -> None:
        write_mark(run.folder.path, run.state.step, run.state.num_tokens)
