"""What follows from what, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from swift.config.bind import resolve
from swift.config.rules import DERIVATIONS
from swift.config.schema import options
from swift.core.errors import ConfigError

NEEDED = ["--model", "m", "--dataset", "d.jsonl"]


def derived(command: str, *words: str, planning: bool = False) -> dict[str, Any]:
    """Every derived value of a configuration."""
    resolved = resolve(command, [*NEEDED, *words], planning=planning)
    return {
        name: resolved.value(name) for name, source in resolved.sources.items() if source.kind == "derived"
    }


def refused(command: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(command, [*NEEDED, *words])
    assert caught.value.exit_code == 2
    return caught.value.render()


def warned(command: str, *words: str) -> list[str]:
    return resolve(command, [*NEEDED, *words]).warnings


def test_what_is_derived_by_default() -> None:
    common = {
        "learning_rate": 1e-4,
        "gradient_accumulation_steps": 16,
        "data_seed": 42,
        "eval_strategy": "no",
        "eval_steps": 500,
        "per_device_eval_batch_size": 1,
        "greater_is_better": False,
    }
    assert derived("sft") == {**common, "use_chat_template": True}
    assert derived("pt") == {**common, "use_chat_template": False, "loss_scale": "all"}


@pytest.mark.parametrize(
    ("words", "name", "value", "source"),
    [
        (["--tuner_type", "full"], "learning_rate", 1e-5, "tuner_type"),
        (["--batch_size", "4"], "gradient_accumulation_steps", 4, "per_device_train_batch_size"),
        (["--batch_size", "32"], "gradient_accumulation_steps", 1, "per_device_train_batch_size"),
        (["--packing"], "gradient_accumulation_steps", 4, "packing"),
        (
            ["--packing", "--batch_size", "2"],
            "gradient_accumulation_steps",
            2,
            "per_device_train_batch_size, packing",
        ),
        (["--dp_size", "2"], "gradient_accumulation_steps", 8, "data_parallel_size"),
        (["--seed", "7"], "data_seed", 7, "seed"),
        (["--val_dataset", "v"], "eval_strategy", "steps", "val_dataset"),
        (["--split_dataset_ratio", "0.1"], "eval_strategy", "steps", "split_dataset_ratio"),
        (
            ["--val_dataset", "v", "--save_strategy", "epoch"],
            "eval_strategy",
            "epoch",
            "val_dataset, save_strategy",
        ),
        (
            ["--val_dataset", "v", "--save_strategy", "no"],
            "eval_strategy",
            "epoch",
            "val_dataset, save_strategy",
        ),
        (
            ["--val_dataset", "v", "--save_strategy", "epoch", "--eval_steps", "5"],
            "eval_strategy",
            "steps",
            "val_dataset, eval_steps, save_strategy",
        ),
        (
            ["--val_dataset", "v", "--save_strategy", "no", "--streaming", "--max_steps", "5"],
            "eval_strategy",
            "steps",
            "val_dataset, save_strategy, streaming",
        ),
        (["--save_steps", "9"], "eval_steps", 9, "save_steps"),
        (["--batch_size", "3"], "per_device_eval_batch_size", 3, "per_device_train_batch_size"),
        (
            ["--val_dataset", "v", "--metric_for_best_model", "eval_token_accuracy"],
            "greater_is_better",
            True,
            "metric_for_best_model",
        ),
        (
            ["--val_dataset", "v", "--metric_for_best_model", "eval_perplexity"],
            "greater_is_better",
            False,
            "metric_for_best_model",
        ),
    ],
)
def test_derivations(words: list[str], name: str, value: Any, source: str) -> None:
    resolved = resolve("sft", [*NEEDED, *words], planning=True)
    assert resolved.value(name) == value
    assert str(resolved.sources[name]) == f"derived from {source}"


EXPLICIT = {
    "learning_rate": "0.5",
    "gradient_accumulation_steps": "3",
    "min_lr_ratio": "0.5",
    "lora_dropout": "0.25",
    "quant_method": "bnb",
    "quant_bits": "8",
    "lr_scheduler_type": "linear",
    "data_seed": "1",
    "eval_strategy": "epoch",
    "eval_steps": "7",
    "per_device_eval_batch_size": "5",
    "greater_is_better": "true",
    "use_chat_template": "false",
    "loss_scale": "last_round",
    "problem_type": "regression",
    "num_labels": "2",
    "loss_type": "mse",
    "enable_thinking": "true",
    "rlhf_type": "kto",
    "rlhf_loss_type": "hinge",
    "beta": "0.7",
    "label_smoothing": "0.2",
    "cpo_alpha": "0.5",
    "task_type": "seq_cls",
    "metric_for_best_model": "eval_mean_length",
    "temperature": "0.7",
    "reward_funcs": "task",
}
_POLICY = ["--rlhf_type", "grpo", "--per_device_train_batch_size", "8", "--reward_funcs", "format"]
OF_RLHF = {
    "rlhf_type": ["--per_device_train_batch_size", "4"],
    "rlhf_loss_type": [],
    "beta": [],
    "label_smoothing": [],
    "cpo_alpha": ["--rlhf_type", "simpo"],
    "task_type": ["--rlhf_type", "rm"],
    "metric_for_best_model": _POLICY,
    "temperature": _POLICY,
    "reward_funcs": _POLICY[:4],
}
BESIDE = {
    "problem_type": ["--task_type", "seq_cls", "--num_labels", "2"],
    "num_labels": ["--task_type", "seq_cls", "--problem_type", "regression"],
    "loss_type": ["--task_type", "seq_cls", "--num_labels", "1"],
    "enable_thinking": ["--task_type", "generative_reranker"],
}


@pytest.mark.parametrize("rule", DERIVATIONS, ids=lambda rule: rule.target)
def test_a_typed_value_is_never_overwritten(rule: Any) -> None:
    word = EXPLICIT[rule.target]
    beside = BESIDE.get(rule.target, OF_RLHF.get(rule.target, []))
    command = "rlhf" if rule.target in OF_RLHF else "sft" if beside else "pt"
    resolved = resolve(command, [*NEEDED, "--val_dataset", "v", f"--{rule.target}", word, *beside])
    value = resolved.value(rule.target)
    assert str(value[0] if isinstance(value, list) else value).lower() == word
    assert resolved.sources[rule.target].kind == "flag"


def test_derivations_only_name_options() -> None:
    for rule in DERIVATIONS:
        assert {rule.target, *rule.inputs} - {"command"} <= set(options())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--packing", "--group_by_length"],
            "--packing: does not go together with group_by_length: packed rows all have the same length\n"
            "  fix: leave out --packing or --group_by_length",
        ),
        (
            ["--tuner_type", "full", "--lora_rank", "8"],
            "--lora_rank: has no effect with tuner_type full\n  fix: leave it out, or set --tuner_type lora",
        ),
        (
            ["--freeze_ratio", "0.5"],
            "--freeze_ratio: has no effect with tuner_type lora\n  fix: leave it out, or set --tuner_type full",
        ),
        (
            ["--lr_decay_ratio", "0.2"],
            "--lr_decay_ratio: has no effect with lr_scheduler_type cosine\n"
            "  fix: leave it out, or set --lr_scheduler_type wsd",
        ),
        (
            ["--warmup_steps", "5", "--warmup_ratio", "0.1"],
            "--warmup_steps: does not go together with warmup_ratio: both set the length of the warm-up\n"
            "  fix: leave out --warmup_steps or --warmup_ratio",
        ),
        (
            ["--warmup_steps", "50", "--max_steps", "10"],
            "--warmup_steps: 50 warm-up steps, but only 10 steps\n  fix: lower --warmup_steps or raise --max_steps",
        ),
        (
            ["--streaming", "--max_steps", "5", "--val_dataset", "v", "--save_strategy", "epoch"],
            "--save_strategy: does not go together with streaming: the end of an epoch is not known beforehand\n"
            "  fix: --save_strategy steps",
        ),
        (
            ["--streaming", "--max_steps", "5", "--val_dataset", "v", "--eval_strategy", "epoch"],
            "--eval_strategy: does not go together with streaming: the end of an epoch is not known beforehand\n"
            "  fix: --eval_strategy steps",
        ),
        (
            ["--max_steps", "0"],
            "--max_steps: 0 steps train nothing\n  fix: -1 trains num_train_epochs epochs",
        ),
        (
            ["--dataset_weights", "1", "2"],
            "--dataset_weights: 2 weights for 1 data sets\n  fix: give one weight per data set",
        ),
        (["--dataset_weights", "0"], "--dataset_weights: weights must not be negative, and not all zero"),
        (
            ["--run_name", "a/b"],
            "--run_name: 'a/b' cannot name a folder\n"
            "  fix: use a name without / and \\, and --output_dir for the folder above it",
        ),
        (
            ["--run_name", ".."],
            "--run_name: '..' cannot name a folder\n"
            "  fix: use a name without / and \\, and --output_dir for the folder above it",
        ),
        (
            ["--truncation_strategy", "split"],
            "--truncation_strategy: split is for swift pt: a conversation cut in pieces loses its question\n"
            "  fix: use delete, left or right",
        ),
        (
            ["--early_stop_interval", "2"],
            "--early_stop_interval: there is no validation data to decide when to stop\n"
            "  fix: add --val_dataset FILE or --split_dataset_ratio 0.05",
        ),
        (
            ["--early_stop_interval", "2", "--val_dataset", "v", "--eval_strategy", "no"],
            "--early_stop_interval: nothing is evaluated with eval_strategy no\n"
            "  fix: set --eval_strategy steps or epoch",
        ),
        (
            ["--metric_for_best_model", "token_accuracy"],
            "--metric_for_best_model: 'token_accuracy' is not a metric of the evaluation\n"
            "  fix: did you mean eval_token_accuracy?",
        ),
        (["--report_to", "none", "wandb"], "--report_to: none stands beside other trackers"),
        (
            ["--device", "cpu", "--use_flash_attn"],
            "--use_flash_attn: needs a CUDA device, not cpu\n  fix: leave it out",
        ),
        (
            ["--device", "cpu", "--use_liger_kernel"],
            "--use_liger_kernel: needs a CUDA device, not cpu\n  fix: leave it out",
        ),
        (
            ["--lr_scheduler_type", "constant", "--min_lr_ratio", "0.1"],
            "--min_lr_ratio: has no effect with lr_scheduler_type constant\n"
            "  fix: leave it out, or set --lr_scheduler_type cosine",
        ),
        (
            ["--use_chat_template", "false", "--enable_thinking"],
            "--enable_thinking: has no effect with use_chat_template false\n"
            "  fix: leave it out, or set --use_chat_template true",
        ),
        (
            ["--val_dataset", "v", "--eval_strategy", "no", "--eval_steps", "5"],
            "--eval_steps: nothing is evaluated with eval_strategy no\n  fix: set --eval_strategy steps or epoch",
        ),
        (
            ["--sequence_parallel"],
            "--sequence_parallel: has no effect without tensor parallelism\n  fix: leave it out",
        ),
        (
            ["--target_regex", "(q"],
            "--target_regex: '(q' is not a regular expression\n"
            "  cause: missing ), unterminated subpattern at position 0",
        ),
        (
            ["--val_dataset", "v", "--metric_for_best_model", "eval_rouge"],
            "--metric_for_best_model: there is no metric 'eval_rouge'\n"
            "  cause: built in: eval_loss, eval_token_accuracy, eval_perplexity\n"
            "  fix: name one of these, or what adds it: --eval_tasks SUITE.yaml or --callbacks FILE.py",
        ),
        (
            ["--device", "cuda:x"],
            "--device: unknown device 'cuda:x'\n  fix: auto, cpu, cuda, npu, xpu, mps, or cuda:1",
        ),
        (["--val_dataset="], "--val_dataset: an empty word\n  fix: leave it out, or name something"),
        (["--json"], "--json: prints a plan, so it needs --dry_run\n  fix: add --dry_run"),
        (
            ["--nproc_per_node", "2", "--fsdp", "full", "--torch_dtype", "float16"],
            "--torch_dtype: float16 is for whole models\n"
            "  cause: gradients overflow on one shard, and the others would not know\n  fix: --torch_dtype bfloat16",
        ),
        (
            ["--tp_size", "2", "--torch_dtype", "float16"],
            "--torch_dtype: float16 is for whole models\n  fix: --torch_dtype bfloat16",
        ),
    ],
)
def test_refused(words: list[str], expected: str) -> None:
    assert refused("sft", *words) == expected


def test_required_options() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("sft", [])
    assert caught.value.render() == "--model: missing\n  fix: add --model PATH"
    with pytest.raises(ConfigError) as caught:
        resolve("infer", [])
    assert caught.value.render() == "--model: missing\n  fix: add --model PATH or --adapters PATH"
    with pytest.raises(ConfigError, match="--adapters: missing"):
        resolve("merge-lora", ["--model", "m"])
    assert resolve("sft", ["--resume_from_checkpoint", "last"]).warnings == []
    assert resolve("infer", ["--adapters", "a"]).warnings == []
    assert resolve("sft", [], partial=True).warnings == []
    assert resolve("sft", [], planning=True).warnings == [
        "--model: missing; a run needs it",
        "--dataset: missing; a run needs it",
    ]


def test_warnings() -> None:
    assert warned("sft", "--device", "cpu", "--fp16") == [
        "--fp16: float16 is slow and overflows on CPU; bfloat16 is safer"
    ]
    assert warned("sft", "--eval_steps", "5") == [
        "--eval_steps: no validation data, so nothing is evaluated; "
        "add --val_dataset FILE or --split_dataset_ratio 0.05"
    ]
    assert warned("sft", "--max_steps", "5", "--epochs", "2") == [
        "--epochs: no effect, max_steps 5 sets the length"
    ]
    infer = resolve("infer", ["--model", "m", "--top_p", "0.9", "--result_path", "r.jsonl"])
    assert infer.warnings == [
        "--top_p: no effect at temperature 0; raise --temperature to sample",
        "--result_path: used for rows of a file only; add --val_dataset FILE",
    ]
    assert resolve("infer", ["--model", "m", "--top_p", "0.9", "--temperature", "1"]).warnings == []


@pytest.mark.parametrize(
    ("words", "warnings"),
    [
        (
            ["--packing", "--padding_free"],
            ["--padding_free: not needed: packed rows have no padding anyway"],
        ),
        (
            ["--streaming", "--max_steps", "5", "--dataset_num_proc", "4", "--num_workers", "2"],
            [
                "--dataset_num_proc: not needed: one process reads a stream",
                "--num_workers: not needed: one process reads a stream",
            ],
        ),
        (["--padding_free"], []),
        (["--packing", "--no_padding_free"], []),
        (["--dataset_num_proc", "4"], []),
    ],
)
def test_what_changes_nothing_is_explained(words: list[str], warnings: list[str]) -> None:
    assert warned("sft", *words) == warnings


def test_a_plan_names_what_a_run_refuses() -> None:
    words = ["--tuner_type", "full", "--lora_rank", "8", "--warmup_steps", "5", "--warmup_ratio", "0.1"]
    assert resolve("sft", [*NEEDED, *words], planning=True).warnings == [
        "--lora_rank: has no effect with tuner_type full; a run refuses it (leave it out, or set --tuner_type lora)",
        "--warmup_steps: does not go together with warmup_ratio: both set the length of the warm-up; "
        "a run refuses it (leave out --warmup_steps or --warmup_ratio)",
    ]
    assert refused("sft", *words).startswith("--lora_rank: has no effect with tuner_type full\n")


def test_split_is_allowed_in_pretraining() -> None:
    assert resolve("pt", [*NEEDED, "--truncation_strategy", "split"]).warnings == []


def test_a_callback_may_add_the_deciding_metric() -> None:
    words = ["--val_dataset", "v", "--metric_for_best_model", "eval_rouge", "--callbacks", "rouge.py"]
    assert resolve("sft", [*NEEDED, *words]).config.evaluation.greater_is_better is True


def test_the_batch_of_a_step_and_the_last_rate_as_numbers() -> None:
    words = [
        *NEEDED,
        "--per_device_train_batch_size",
        "4",
        "--global_batch_size",
        "24",
        "--data_parallel_size",
        "2",
    ]
    resolved = resolve("sft", [*words, "--learning_rate", "2e-4", "--min_lr", "2e-5"], planning=True)
    assert resolved.value("gradient_accumulation_steps") == 3
    assert str(resolved.sources["gradient_accumulation_steps"]).startswith("derived from global_batch_size")
    assert resolved.value("min_lr_ratio") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--global_batch_size", "10", "--per_device_train_batch_size", "4"],
            "--global_batch_size: 10 samples per step cannot be made of micro-batches of 4\n"
            "  fix: set it to 8, or change --per_device_train_batch_size",
        ),
        (
            ["--global_batch_size", "8", "--gradient_accumulation_steps", "2"],
            "--global_batch_size: does not go together with gradient_accumulation_steps: each follows from the other\n"
            "  fix: leave one of them out",
        ),
        (
            ["--learning_rate", "1e-5", "--min_lr", "1e-4"],
            "--min_lr: 0.0001 is above the peak of 1e-05\n  fix: lower --min_lr or raise --learning_rate",
        ),
    ],
)
def test_batches_and_rates_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("sft", [*NEEDED, *words])
    assert caught.value.render() == message


def test_another_kind_of_work_is_no_advice() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("rlhf", values={"model": "m", "dataset": "d", "temperature": 0.5})
    assert caught.value.message == "has no effect with rlhf_type dpo" and caught.value.fix == "leave it out"
