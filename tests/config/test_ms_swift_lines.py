"""Command lines as people write them for ms-swift: read as its shell and parser read them, planned whole, and where
this version cannot do a thing, refused in a run with one line that names the option and what to do instead.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from swift.cli.fit import command_meant
from swift.cli.main import main
from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.core.errors import ConfigError

NEEDED = "--model m --dataset d"


def planned(line: str) -> Resolved:
    """The plan of a line as a shell passes it on, without the program's name."""
    first, *rest = shlex.split(line.replace("\\\n", ""))
    command, words = command_meant(first, rest)
    return resolve(command, words, planning=True)


def refused(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        first, *rest = shlex.split(line)
        resolve(first, rest)
    return caught.value.render()


def test_values_are_read_as_a_shell_passes_them() -> None:
    resolved = planned(
        r"""sft --model "org/name" --dataset 'org/zh#500' \
              'org/en:part#20' 'HF::org/other' --dataset more.jsonl --system You\ are\ brief. \
        --columns '{"question": "query"}' --gradient_checkpointing_kwargs '{"use_reentrant": false}' \
        --target_regex '^(model).*\.(q_proj|v_proj)$' --output_dir=out/a=b --learning-rate=2e-5 --packing"""
    )
    assert resolved.value("dataset") == ["org/zh#500", "org/en:part#20", "HF::org/other", "more.jsonl"]
    assert resolved.value("system") == "You are brief."
    assert resolved.value("columns") == {"question": "query"}
    assert resolved.value("target_regex") == r"^(model).*\.(q_proj|v_proj)$"
    assert resolved.value("output_dir") == "out/a=b"
    assert resolved.value("learning_rate") == 2e-5
    assert resolved.value("packing") is True
    assert [text for text in resolved.warnings if "columns" in text] == []


def test_a_value_may_begin_with_a_minus_or_be_empty() -> None:
    resolved = planned(
        f"export {NEEDED} --quant_method gptq --quant_batch_size -1 --hub_model_id '' --seed 7"
    )
    assert (resolved.value("seed"), resolved.value("quant_batch_size")) == (7, -1)
    assert [text.partition(":")[0] for text in resolved.warnings] == ["--hub_model_id"]


def test_cached_data_is_added_to_the_other(tmp_path: Path) -> None:
    line = (
        f"sft {NEEDED} --dataset e --cached_dataset tokens/a tokens/b --cached_val_dataset v --val_dataset w"
    )
    assert planned(line).value("dataset") == ["d", "e", "tokens/a", "tokens/b"]
    assert planned(line).value("val_dataset") == ["v", "w"]
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata:\n  cached_dataset: tokens\n  dataset: d\n", encoding="utf-8")
    assert planned(f"sft {file}").value("dataset") == ["tokens", "d"]
    assert refused(f"sft {NEEDED} --train_file e").startswith("--train_file: contradicts --dataset")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--cached_dataset tokens/train", "dataset", ["d", "tokens/train"]),
        ("--cached_val_dataset tokens/val", "val_dataset", ["tokens/val"]),
        ("--torch_dtype None", "torch_dtype", "auto"),
        ("--truncation_strategy None", "truncation_strategy", "delete"),
        ("--lora_dtype None", "lora_dtype", "float32"),
        ("--attention_backend unfused", "attn_impl", "eager"),
        ("--optimizer dist_muon --tuner_type full", "optim", "muon"),
        ("--report_to tensorboard comet_ml", "report_to", ["tensorboard"]),
        ("--report_to neptune", "report_to", []),
        ("--loss_scale last_round+hermes", "loss_scale", "default"),
        ("--loss_scale last_round", "loss_scale", "last_round"),
        ("--train_type dummy", "tuner_type", "lora"),
    ],
)
def test_values(words: str, name: str, value: object) -> None:
    if name == "lora_dtype":
        value = resolve("sft", [], partial=True).value("lora_dtype")
    assert planned(f"sft {NEEDED} {words}").value(name) == value


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        (
            f"sft {NEEDED} --loss_scale default+ignore_empty_think",
            "--loss_scale: not in this version: default+ignore_empty_think: weights by pattern come with a later "
            "version; a run refuses it",
        ),
        (
            f"sft {NEEDED} --report_to tensorboard comet_ml",
            "--report_to: not in this version: comet_ml: there is no such tracker here; a run refuses it",
        ),
        (
            "infer --model m --max_length 512 --truncation_strategy right",
            "--max_length, --truncation_strategy: not used by swift infer; a run refuses them",
        ),
        (
            f"sft {NEEDED} --temperature 0.7",
            "--temperature: not used by swift sft; a run refuses it",
        ),
        (
            "export --model m --dataset d --to_cached_dataset true --template_mode rlhf",
            "--to_cached_dataset, --template_mode: not in this version: training keeps the tokens of its data by "
            "itself; a run refuses them",
        ),
        (
            f"sft {NEEDED} --optim_args beta=1",
            "--optim_args: not in this version: optimizers have options of their own here; a run refuses it",
        ),
        (
            f"sft {NEEDED} --experts_impl grouped_mm",
            "--experts_impl: not needed: that is decided here by itself",
        ),
        (
            f"megatron sft {NEEDED} --gradient_accumulation_fusion false --no_masked_softmax_fusion",
            "--gradient_accumulation_fusion, --no_masked_softmax_fusion: not needed: that chooses among Megatron's "
            "kernels",
        ),
        (
            "deploy --adapters name=folder --sglang_tp_size 2 --infer_backend sglang",
            "--infer_backend: not in this version: sglang: this engine comes with a later version; a run refuses it",
        ),
        (
            f"rlhf {NEEDED} --rlhf_type grpo --gc_collect_after_offload true --multi_turn_func tip",
            "--gc_collect_after_offload, --multi_turn_func: not in this version: answers are sampled by the embedded "
            "engine, in this process; servers and several turns come with a later version; a run refuses them",
        ),
    ],
)
def test_a_plan_names_what_is_missing(line: str, warning: str) -> None:
    assert warning in planned(line).warnings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"sft {NEEDED} --ulysses_degree 2",
            "--ulysses_degree: not in this version: both follow from the number of heads",
        ),
        (
            f"sft {NEEDED} --loss_scale last_round+hermes",
            "--loss_scale: not in this version: last_round+hermes: weights by pattern come with a later version",
        ),
        (
            f"sft {NEEDED} --report_to wandb neptune",
            "--report_to: not in this version: neptune: there is no such tracker here",
        ),
        (
            f"sft {NEEDED} --experts_impl eager --loss_type sigmoid",
            "--loss_type: not in this version: sigmoid: that is a loss of swift rlhf",
        ),
        ("infer --model m --max_length 512", "--max_length: not used by swift infer"),
        (f"sft {NEEDED} --train_type full --lora_rank 8", "--lora_rank: has no effect with tuner_type full"),
    ],
)
def test_a_run_refuses_with_one_line_and_an_alternative(line: str, expected: str) -> None:
    message, fix = refused(line).split("\n")
    assert message == expected
    assert fix.startswith("  fix: ")


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("--lora_rnak 8", "lora_rank"),
        ("--vllm_gpu_memory_utilisation 0.9", "vllm_gpu_memory_utilization"),
        ("--masked_softmax_fuson true", "masked_softmax_fusion"),
    ],
)
def test_what_nobody_has_gets_the_nearest_name_in_a_plan_too(words: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(f"sft {NEEDED} {words}")
    assert caught.value.render().endswith(f"did you mean --{near}?")


@pytest.mark.parametrize("words", ["--gpus 4", "--frobnicate true", "--loss_scale hermess"])
def test_what_nobody_has_is_not_accepted(words: str) -> None:
    with pytest.raises(ConfigError):
        planned(f"sft {NEEDED} {words}")


RAY = """\
rlhf_type: gkd
model: m
dataset: d
use_vllm: true
colocate_groups: [[train, rollout]]
train:
  gpus: 4
  tuner_type: lora
  lora_rank: 16
  tensor_model_parallel_size: 2
rollout:
  gpus: 4
  vllm_max_model_len: 16384
"""


def test_the_roles_of_a_ray_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RAY, encoding="utf-8")
    resolved = planned(f"megatron rlhf --use_ray true --config {file}")
    assert (resolved.value("lora_rank"), resolved.value("tensor_parallel_size")) == (16, 2)
    assert (
        f"{file}:5: colocate_groups, {file}:6: train, {file}:11: rollout, --use_ray: not in this version: Ray comes "
        "with a later version; a run refuses them" in resolved.warnings
    )


def test_unknown_options_of_a_role_are_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RAY.replace("vllm_max_model_len", "vllm_max_modl_len"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rollout\.vllm_max_modl_len: unknown option") as caught:
        planned(f"megatron rlhf --config {file}")
    assert caught.value.fix == "did you mean vllm_max_model_len?"


def test_train_without_devices_is_a_section(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d\ntrain:\n  learning_rate: 1e-5\n", encoding="utf-8")
    resolved = planned(f"sft {file}")
    assert resolved.value("learning_rate") == 1e-5
    assert resolved.warnings == []


def test_the_command_line_says_it_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"sft {NEEDED} --fsdp_config fsdp.json")) == 2
    assert capsys.readouterr().err == (
        "error: --fsdp_config: not in this version: what it holds are options here\n"
        "  fix: --fsdp full, with --offload true or --reshard_after_forward false\n"
    )
