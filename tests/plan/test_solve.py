"""What fits, and what makes a run fit: the flags that are printed are put back and planned again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swift.cli import plan as plan_command
from swift.config.bind import resolve
from swift.core.errors import UsageError
from swift.plan.ladder import AFTER_FAILURE, LADDER, changes, smaller_batch
from swift.plan.plan import make_plan
from swift.plan.verdict import TIGHT_SHARE

GIB = 1 << 30


def plan_of(words: str, gib: float, command: str = "sft", solving: bool = True) -> Any:
    argv = f"--model qwen3-8b --dataset none.jsonl --device cuda {words}".split()
    return make_plan(resolve(command, argv, planning=True), device_memory=int(gib * GIB), solving=solving)


@pytest.mark.parametrize(
    ("words", "gib", "command"),
    [
        ("--tuner_type full --per_device_train_batch_size 8", 24, "sft"),
        ("--tuner_type full", 80, "sft"),
        ("--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --max_length 8192", 40, "sft"),
        ("--gradient_checkpointing false", 20, "sft"),
        ("--rlhf_type dpo --tuner_type full", 48, "rlhf"),
        ("--rlhf_type dpo --ref_model Qwen/Qwen3-8B", 30, "rlhf"),
        ("--rlhf_type grpo --generation_batch_size 64 --max_completion_length 2048", 40, "rlhf"),
    ],
)
def test_pasted_flags_make_it_fit(words: str, gib: float, command: str) -> None:
    plan = plan_of(words, gib, command)
    solution = plan.solution
    assert plan.fits is False and solution["fits"] is True and solution["changes"]
    after = plan_of(f"{words} {solution['flags']}", gib, command, solving=False)
    assert after.fits is True
    assert after.memory["total"] == solution["total_bytes"] <= TIGHT_SHARE * gib * GIB
    totals = [change["total_bytes"] for change in solution["changes"]]
    assert totals == sorted(totals, reverse=True) and totals[-1] == solution["total_bytes"]


def test_answers_are_written_in_more_goes_where_their_keys_and_values_do_not_fit() -> None:
    """64 answers of 2048 tokens beside prompts of as many: 36 layers x 2 x 8 x 128 numbers of 2 bytes for each."""
    plan = plan_of("--rlhf_type grpo --generation_batch_size 64 --max_completion_length 2048", 40, "rlhf")
    assert plan.memory["parts"]["cache"] == pytest.approx(
        64 * 4097 * 36 * 2 * 8 * 128 * 2 * (1 + 1 / 72), rel=1e-3
    )
    assert plan.solution["flags"] == "--max_num_seqs 32"
    shards = "--rlhf_type grpo --dp_size 8 --fsdp full --generation_batch_size 64"
    parts = plan_of(shards, 40, "rlhf", solving=False).memory["parts"]
    assert parts["temporary"] > 8 * parts["weights"], "the whole model is there while its answers are sampled"


def test_full_training_stays_full_where_its_copies_in_float32_are_what_is_too_much() -> None:
    assert plan_of("--tuner_type full", 80).solution["flags"] == "--param_dtype bfloat16"
    assert (
        plan_of("--tuner_type full --torch_dtype float32", 80)
        .solution["flags"]
        .startswith("--tuner_type lora")
    )


def test_no_change_can_be_left_out() -> None:
    words = "--tuner_type full --per_device_train_batch_size 8"
    solution = plan_of(words, 24).solution
    for change in solution["changes"][:-1]:
        others = " ".join(one["flags"] for one in solution["changes"] if one is not change)
        assert plan_of(f"{words} {others}", 24, solving=False).fits is False, change


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "max_length", "lora_rank"])
def test_largest_value_fits_and_a_larger_one_does_not(name: str) -> None:
    value = plan_of("", 24).solution["largest"][name]
    assert plan_of(f"--{name} {value}", 24, solving=False).fits is True
    assert plan_of(f"--{name} {int(value * 1.05) + 1}", 24, solving=False).fits is False


def test_what_cannot_be_made_to_fit_says_so() -> None:
    solution = plan_of("--tuner_type full", 2).solution
    assert solution["fits"] is False and solution["total_bytes"] > 2 * GIB
    assert set(solution["largest"].values()) == {None}


def test_a_run_that_fits_needs_no_change() -> None:
    solution = plan_of("", 80).solution
    assert (solution["fits"], solution["changes"], solution["flags"]) == (True, [], "")


def test_card_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = "sft --model qwen3-8b --dataset none.jsonl --device cuda --tuner_type full --solve --device_memory=24GiB"
    assert plan_command.run(words.split()) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("fits with")]
    assert plan_command.run([*words.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert line.split("fits with")[1].strip() == plan["solution"]["flags"]
    assert plan["memory"]["device_bytes"] == 24 * GIB
    for bad in (["--device_memory", "lots"], ["--device_memory"]):
        with pytest.raises(UsageError, match="is not a size"):
            plan_command.run(["sft", "--model", "qwen3-8b", *bad])


def test_nothing_to_solve_for() -> None:
    argv = "--model no/such --dataset none.jsonl --device cuda".split()
    with pytest.raises(UsageError, match="nothing can be solved for"):
        make_plan(resolve("sft", argv, planning=True), device_memory=GIB, solving=True)


def test_the_ladder_of_a_failed_run_changes_no_result() -> None:
    options = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2, "tuner_type": "full"}
    first = next(changes(options, AFTER_FAILURE))
    assert first.overrides == {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    assert smaller_batch({**options, "loss_type": "infonce", "infonce_use_batch": True}) is None
    assert smaller_batch({**options, "rlhf_loss_type": ["kto"]}) is None
    single = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert list(changes(single, AFTER_FAILURE)) == []
    assert LADDER[:2] == AFTER_FAILURE


def test_a_run_reads_what_is_said_of_a_too_large_one(tmp_path: Path) -> None:
    plan = plan_of("--tuner_type full", 24, solving=False)
    assert any("swift plan sft ... --solve" in warning for warning in plan.warnings)
