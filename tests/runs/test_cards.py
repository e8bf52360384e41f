"""Cards are plain in a pipe, framed on a terminal, and end with commands to paste."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from swift.runs.cards import end_card_lines, print_end_card, print_plan_card

SUMMARY: dict[str, Any] = {
    "steps": 120,
    "first_loss": 2.5,
    "last_loss": 0.25,
    "evaluation": {"eval_loss": 0.5, "eval_token_accuracy": 0.9, "eval_seconds": 3.0},
    "best_step": 100,
    "num_tokens": 1_500_000,
    "train_seconds": 75.0,
    "tokens_per_second": 20_000.0,
    "peak_memory_gib": 1.5,
    "stop_reason": None,
    "last_checkpoint": "checkpoint-120",
    "best_checkpoint": "checkpoint-100",
}
PLAN: dict[str, Any] = {
    "command": "sft",
    "config": {"checkpoint": {"output_dir": "output"}},
    "model": {
        "path": "models/a",
        "architecture": "Qwen3ForCausalLM",
        "parameters": 1_000_000,
        "trainable_parameters": 2000,
        "dtype": "float32",
    },
    "data": {
        "rows": 1200,
        "tokens": 50_000,
        "tokens_exact": False,
        "sampled_rows": 256,
        "validation_rows": 0,
    },
    "steps": {},
    "memory": {},
    "parallel": {"devices_needed": 1, "layout": "one device"},
    "fits": None,
    "warnings": ["something is odd"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lora_run(folder: Path) -> Path:
    for name in ("checkpoint-100", "checkpoint-120"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
    return folder


def test_end_card_in_a_pipe(tmp_path: Path) -> None:
    out = io.StringIO()
    print_end_card(lora_run(tmp_path), SUMMARY, out)
    lines = out.getvalue().splitlines()
    assert lines == [
        "-- done",
        "   loss         2.5000 -> 0.2500",
        "   evaluation   loss 0.5, token accuracy 0.9; best at step 100",
        "   work         120 steps, 1.5M tokens in 1m15s (20,000 tokens/s)",
        "   peak memory  1.50 GiB",
        f"   folder       {tmp_path}",
        "   checkpoints  last = checkpoint-120, best = checkpoint-100",
        f"   next         swift infer --adapters {tmp_path}/best",
        f"                swift merge-lora --adapters {tmp_path}/best",
    ]


def test_an_adapter_that_is_no_change_of_weights_is_not_to_be_merged(tmp_path: Path) -> None:
    (lora_run(tmp_path) / "checkpoint-100" / "adapter_config.json").write_text('{"peft_type": "SWIFT_REFT"}')
    assert end_card_lines(tmp_path, SUMMARY)[-1] == ("next", f"swift infer --adapters {tmp_path}/best")


def test_full_training_and_early_stop(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-120").mkdir()
    summary = {**SUMMARY, "best_checkpoint": None, "stop_reason": "eval_loss did not improve"}
    lines = end_card_lines(tmp_path, summary)
    assert lines[-2:] == [("next", f"swift infer --model {tmp_path}/last"), ("", f"swift resume {tmp_path}")]


def test_no_checkpoint_no_commands(tmp_path: Path) -> None:
    lines = end_card_lines(tmp_path, {"steps": 1, "num_tokens": 10, "last_loss": None})
    assert lines == [("work", "1 steps, 10 tokens"), ("folder", str(tmp_path))]


def test_plan_card_in_a_pipe() -> None:
    out = io.StringIO()
    print_plan_card(PLAN, out)
    text = out.getvalue()
    assert "\x1b" not in text
    assert text.splitlines() == [
        "-- swift sft",
        "   model    models/a  (Qwen3ForCausalLM, 1.0M parameters, 2.0K trained, float32)",
        "   data     1,200 rows, 50.0K tokens (estimated from 256 rows)",
        "   folder   output/vN-DATE-TIME",
        "   warning  something is odd",
    ]


def test_square_brackets_are_not_markup_on_a_terminal() -> None:
    out = Terminal()
    print_plan_card({**PLAN, "warnings": ["see [bold]this[/bold] path"]}, out)
    assert "[bold]this[/bold]" in out.getvalue()
    assert "╭" in out.getvalue()


def test_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    (tmp_path / "my run" / "checkpoint-120").mkdir(parents=True)
    lines = end_card_lines(tmp_path / "my run", {**SUMMARY, "best_checkpoint": None})
    assert lines[-1] == ("next", f"swift infer --model '{tmp_path}/my run/last'")


def test_a_policy_tells_its_rewards(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    rows = [{"step": 1, "reward": 0.25}, {"step": 2, "loss": 0.0}, {"step": 3, "reward": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = end_card_lines(tmp_path, SUMMARY)
    assert ("reward", "0.2500 -> 0.7500") in lines and "loss" not in dict(lines)
    assert lines[-1][1] == f"swift rollouts show {tmp_path}"
