"""Plans of real folders and files; the numbers are those the run will have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift.cli import plan as plan_command
from swift.config.bind import resolve
from swift.core.errors import UsageError
from swift.models.tiny import make_tiny_model
from swift.plan.plan import make_plan
from swift.plan.rows import fit_lengths
from swift.plan.steps import plan_epoch, step_counts

KEYS = "command config sources model data steps memory parallel export time solution fits warnings".split()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    make_tiny_model(folder / "model")
    for name, count in (("small", 40), ("large", 1000)):
        rows = [
            {"query": f"What is {i} plus one?", "response": f"{i + 1} " * (1 + i % 30)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plan_of(work: Path, *flags: str, data: str = "small.jsonl") -> dict[str, Any]:
    argv = ["--model", str(work / "model"), "--dataset", str(work / data), "--device", "cpu", *flags]
    return make_plan(resolve("sft", argv, planning=True)).to_dict()


def test_keys_and_plain_values(work: Path) -> None:
    plan = plan_of(work)
    assert list(plan) == KEYS
    assert json.loads(json.dumps(plan)) == plan
    assert plan["sources"]["learning_rate"] == "derived from tuner_type"
    assert plan["sources"]["max_length"] == "derived from the model's context length"


def test_tokens_are_those_of_the_run(work: Path) -> None:
    from swift.models.load import load_template

    template = load_template(work / "model", resolve("sft", [], partial=True).config.template)
    rows = [json.loads(line) for line in (work / "small.jsonl").read_text().splitlines()]
    encoded = template.encode_many(
        [
            ([{"role": "user", "content": r["query"]}, {"role": "assistant", "content": r["response"]}], None)
            for r in rows
        ]
    )
    data = plan_of(work)["data"]
    assert data["tokens"] == sum(len(one.input_ids) for one in encoded)
    assert (data["rows"], data["tokens_exact"], data["sampled_rows"]) == (40, True, 40)


def test_large_data_is_estimated_and_says_so(work: Path) -> None:
    data = plan_of(work, data="large.jsonl")["data"]
    assert (data["rows"], data["rows_exact"], data["tokens_exact"]) == (1000, True, False)
    assert data["sampled_rows"] == 250
    assert plan_of(work, data="large.jsonl#100")["data"]["rows"] == 100


def test_steps_without_the_models_tokenizer_follow_from_the_size_of_the_texts(work: Path) -> None:
    (work / "by-hand.jsonl").write_text(
        '{"query": "123456789", "response": "\u6c49\u5b57"}\n' * 40
    )  # 9 and 6 bytes
    plans = []
    for name in ("by-hand.jsonl", "small.jsonl"):
        argv = ["--model", "qwen3-0.6b", "--dataset", str(work / name), "--device", "cuda"]
        resolved = resolve("sft", argv, planning=True)
        plans.append(make_plan(resolved, device_memory=24 << 30, solving=True).to_dict())
    first = plans[0]
    assert first["data"]["tokens"] == 40 * (4 + 10)  # 15 bytes are 4 tokens, and two turns of 5
    assert first["data"]["tokens_guessed"] and not first["data"]["tokens_exact"]
    assert (first["steps"]["total"], first["steps"]["steps_per_epoch"]) == (9, 3)  # 16 rows a step
    assert first["time"]["seconds"] is None and not first["time"]["can_be_measured"]
    # What may fit is not told by a guess: both as for rows of full length.
    assert plans[1]["memory"]["parts"] == first["memory"]["parts"]
    assert plans[1]["solution"] == first["solution"]


def test_steps_by_hand(work: Path) -> None:
    # 38 training rows (5 % of 40 aside): 10 micro-batches of 4, 4 steps of 3 an epoch, 8 in 2 epochs, 25 % warm-up
    flags = "--split_dataset_ratio 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 3"
    plan = plan_of(work, *flags.split(), "--num_train_epochs", "2", "--warmup_ratio", "0.25")
    steps = plan["steps"]
    assert plan["data"]["rows"] == 38 and plan["data"]["validation_rows"] == 2
    assert (steps["micro_batches_per_epoch"], steps["steps_per_epoch"]) == (10, 4)
    assert (steps["total"], steps["warmup_steps"]) == (8, 2)


def test_lora_parameters_are_those_of_the_tuned_model(work: Path) -> None:
    import torch

    from swift.models.load import load_model
    from swift.tuners.apply import apply_tuner

    resolved = resolve("sft", ["--lora_rank", "4"], partial=True)
    model = load_model(work / "model", dtype=torch.float32, device=torch.device("cpu"), attention="sdpa")
    tuned = apply_tuner(model, resolved.config.tuner, seed=1, param_dtype=torch.float32)
    plan = plan_of(work, "--lora_rank", "4")
    assert plan["model"]["trainable_parameters"] == tuned.num_trainable
    assert plan["model"]["parameters"] == tuned.num_total - tuned.num_trainable


def test_targets_and_full(work: Path) -> None:
    every = plan_of(work)["model"]["trainable_parameters"]
    some = plan_of(work, "--target_modules", "q_proj", "v_proj")["model"]["trainable_parameters"]
    assert 0 < some < every
    full = plan_of(work, "--tuner_type", "full")
    assert full["model"]["trainable_parameters"] == full["model"]["parameters"]
    assert full["memory"]["parts"]["adapters"] == 0
    warnings = plan_of(work, "--target_modules", "no_such_layer")["warnings"]
    assert any("target_modules" in warning for warning in warnings)


def test_what_cannot_be_resolved_is_a_warning(work: Path) -> None:
    argv = ["--model", "no/such/model", "--dataset", "none.jsonl", "--device", "cpu"]
    plan = make_plan(resolve("sft", argv, planning=True)).to_dict()
    assert plan["fits"] is None and plan["model"] == {} and plan["memory"] == {}
    assert any("no/such/model" in warning for warning in plan["warnings"])
    assert any("none.jsonl" in warning for warning in plan["warnings"])


def test_over_large_layout_does_not_fit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.plan.device.cpu_count", lambda: 1)
    plan = plan_of(work, "--tensor_parallel_size", "4", "--pipeline_parallel_size", "2")
    assert plan["fits"] is False and plan["memory"]["fits"] is True
    assert (plan["parallel"]["devices_needed"], plan["parallel"]["devices_present"]) == (8, 1)
    assert any("needs 8 devices" in warning for warning in plan["warnings"])
    assert plan_of(work)["fits"] is True


def test_long_rows_are_announced(work: Path) -> None:
    plan = plan_of(work, "--max_length", "40")
    assert plan["data"]["longer_than_max_length"] > 0.1
    assert any("longer than max_length 40 and will be left out" in warning for warning in plan["warnings"])


def test_planning_changes_nothing(work: Path) -> None:
    resolved = resolve("sft", ["--model", str(work / "model"), "--dataset", str(work / "small.jsonl")])
    before = resolved.config.model_copy(deep=True)
    make_plan(resolved)
    assert resolved.config == before and resolved.config.data.max_length is None


def test_fit_lengths() -> None:
    assert fit_lengths([3, 10], 4, "delete") == [3]
    assert fit_lengths([3, 10], 4, "left") == [3, 4]
    # pieces overlap by a token: starts 0, 3, 6
    assert fit_lengths([10], 4, "split") == [4, 4, 4]
    assert fit_lengths([3, 10], None, "delete") == [3, 10]


def test_packed_epoch_by_hand() -> None:
    # best fit decreasing into 10: 6+4, 6+4, 5
    epoch = plan_epoch([6, 6, 5, 4, 4], 5, batch_size=2, mode="packed", max_length=10, group_by_length=False)
    assert (epoch.micro_batches, epoch.exact, epoch.widest) == (2, True, 20)
    assert epoch.padding == pytest.approx(1 - 25 / 30)
    # ten times as many samples of the same kind: 30 rows
    more = plan_epoch([6, 6, 5, 4, 4], 50, batch_size=2, mode="packed", max_length=10, group_by_length=False)
    assert (more.micro_batches, more.exact) == (13, False)  # the fives pair up: 20 + 5 rows


def test_step_counts() -> None:
    training = resolve("sft", ["--max_steps", "7", "--gradient_accumulation_steps", "4"], partial=True)
    assert step_counts(10, training.config.training) == (3, 7, 0)


def test_json_is_one_object_and_torch_stays_out(work: Path) -> None:
    program = (
        "import sys, swift.cli.main as m\n"
        "code = m.main(sys.argv[1:])\n"
        "heavy = [n for n in ('torch', 'transformers', 'matplotlib', 'rich') if n in sys.modules]\n"
        "print(heavy, file=sys.stderr); sys.exit(code)\n"
    )
    words = ["plan", "sft", "--model", str(work / "model"), "--dataset", str(work / "large.jsonl"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == KEYS
    assert done.stderr.splitlines()[-1] == "[]"


def test_card_names_values_and_sources(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(work / "model")
    code = plan_command.run(
        ["sft", "--model", model, "--dataset", str(work / "small.jsonl"), "--lora_rank", "4"]
    )
    out = capsys.readouterr().out
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("lora_rank")]
    assert line.split() == ["lora_rank", "4", "--lora_rank"]
    assert "40 rows" in out and "(counted)" in out


def test_unknown_command_to_plan() -> None:
    with pytest.raises(UsageError, match="swift plan sft"):
        plan_command.run(["stf"])
    with pytest.raises(UsageError, match="which command"):
        plan_command.run([])


def test_missing_files_and_too_long_rows_are_named(work: Path) -> None:
    plan = plan_of(work, "--adapters", "gone", "--callbacks", "gone.py:C", "--max_length", "99999")
    limit = plan["model"]["context_length"]
    assert plan["warnings"][-3:] == [
        f"max_length 99999 is beyond the model's context of {limit} tokens",
        "--adapters: no such folder 'gone'",
        "--callbacks: no such file 'gone.py:C'",
    ]
    infer = resolve("infer", ["--model", str(work / "model"), "--val_dataset", "gone.jsonl"], planning=True)
    assert make_plan(infer).warnings == ["gone.jsonl: no such file or folder"]


def test_weights_of_data_sets_that_are_not_here_are_left_out(work: Path) -> None:
    words = ("gone.jsonl", str(work / "large.jsonl"), "--dataset_weights", "1", "2", "1")
    plan = plan_of(work, *("--dataset", *words))
    assert [entry["taken"] for entry in plan["data"]["datasets"]] == [40, 40]
    assert plan["warnings"] == ["gone.jsonl: no such file or folder"]


def test_rows_that_teach_nothing_are_told(work: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"query": "q"}]
    (work / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [text for text in plan_of(work, data="dpo.jsonl")["warnings"] if "2 rows looked at" in text]
    assert len(told) == 2
    assert "1 row has no assistant message" in told[0] and "preference data" in told[1]


def test_a_short_name_needs_no_download() -> None:
    """qwen3-7b of the articles: planned from the table of sizes, with the note that Qwen3 has no 7B."""
    plan = make_plan(resolve("sft", ["--model", "qwen3-7b", "--dataset", "x.jsonl"], planning=True))
    assert plan.model["parameters"] == pytest.approx(8.19e9, rel=0.01)
    assert (plan.model["path"], plan.model["parameters_exact"]) == (None, False)
    assert plan.model["architecture"] == "Qwen3ForCausalLM"
    # LoRA of rank 8 on all linear layers: 8 * (inputs + outputs) of each.
    hidden, inner, queries, keys = 4096, 12288, 4096, 1024
    layer = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    assert plan.model["trainable_parameters"] == 8 * 36 * layer
    assert plan.memory["parts"] and plan.memory["total"] > 8.19e9 * 2
    assert any("Qwen3 has no 7B" in warning for warning in plan.warnings)


def test_a_plan_of_policy_optimisation_counts_answers(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    words = [
        "--model",
        str(tiny_model_dir),
        "--dataset",
        "task:reverse#40",
        "--rlhf_type",
        "grpo",
        "--device",
        "cpu",
    ]
    words += [
        "--num_generations",
        "4",
        "--per_device_train_batch_size",
        "16",
        "--max_completion_length",
        "30",
    ]
    words += ["--num_train_epochs", "2", "--use_vllm_sampler", "true"]
    found = make_plan(resolve("rlhf", words, planning=True))
    assert found.steps["total"] == 2 * 40 * 4 // 16
    assert found.steps["largest_micro_batch_tokens"] >= 16 * 30
    twice = make_plan(resolve("rlhf", [*words, "--num_iterations", "2"], planning=True))
    assert twice.steps["total"] == 2 * found.steps["total"], "each answer is learned from twice"
    assert twice.steps["tokens_per_step"] == found.steps["tokens_per_step"]
    assert any("vLLM samplers" in warning for warning in found.warnings)
