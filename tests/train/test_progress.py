"""The progress line: few plain lines without a terminal, one renewed line with one."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from swift.train.callbacks.progress import ProgressLine, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_run(step: int = 0, total: int = 100) -> Any:
    return SimpleNamespace(state=SimpleNamespace(step=step), total_steps=total)


def log(line: ProgressLine, run: Any, step: int) -> None:
    run.state.step = step
    line.on_log(run, {"loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 1234.6})


def test_plain_lines_at_most_every_ten_seconds_and_at_the_end() -> None:
    out, clock, run = io.StringIO(), Clock(), make_run()
    line = ProgressLine(out, clock)
    line.on_train_begin(run)
    for step in (5, 10, 15, 20, 25):
        clock.now += 4.0
        log(line, run, step)
    log(line, run, 100)
    assert out.getvalue().splitlines() == [
        "step 5/100  loss 1.5000  lr 1.00e-04  1,235 tok/s  1m16s left",
        "step 20/100  loss 1.5000  lr 1.00e-04  1,235 tok/s  1m04s left",
        "step 100/100  loss 1.5000  lr 1.00e-04  1,235 tok/s  0.0s left",
    ]


def test_evaluation_is_always_told() -> None:
    out = io.StringIO()
    line = ProgressLine(out, Clock())
    run = make_run(50)
    line.on_train_begin(run)
    line.on_evaluate(run, {"eval_loss": 0.25, "eval_token_accuracy": 0.5, "eval_seconds": 2})
    assert out.getvalue() == "step 50/100  evaluation: loss 0.25, token accuracy 0.5\n"


def test_terminal_line_ends_with_the_run() -> None:
    out, run = Terminal(), make_run()
    line = ProgressLine(out, Clock())
    line.on_train_begin(run)
    log(line, run, 50)
    line.on_step_end(run)
    line.on_train_end(run, {})
    line.close()
    assert "50/100" in out.getvalue()


def test_unknown_values_are_left_out() -> None:
    assert describe({"loss": None, "tokens_per_second": None}, None) == ""
    failing = describe({"reward": 0.5, "failed_rewards": 3.0}, None)
    assert failing == "reward 0.5000  3 answers whose reward failed (log.txt)"
