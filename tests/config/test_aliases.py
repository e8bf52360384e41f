"""Every row of aliases.yaml does what it says, and the articles' own commands are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from swift.config.aliases import Alias, Unsupported, alias_table
from swift.config.bind import resolve
from swift.config.commands import COMMANDS
from swift.config.kinds import Kind
from swift.config.schema import Option, options
from swift.core.errors import ConfigError

TABLE = alias_table()

# Options that only make sense beside another one.
BESIDE = {
    "dataset_weights": ["--dataset", "d"],
    "chat_template": ["--use_chat_template", "true"],
    "early_stop_interval": ["--val_dataset", "v"],
    "freeze_parameters_ratio": ["--tuner_type", "full"],
    "eval_steps": ["--val_dataset", "v"],
    "eval_strategy": ["--val_dataset", "v"],
    "metric_for_best_model": ["--val_dataset", "v"],
}


def sample(kind: Kind, option: Option) -> tuple[str, Any]:
    """A word for the command line that is not the default, and the value it stands for."""
    if kind.base == "list":
        word, value = sample(kind.item or kind, option)
        return word, [value]
    if kind.base == "dict":
        return '{"a": "b"}', {"a": "b"}
    if kind.base == "bool":
        return "true", True
    if kind.base == "choice":
        return kind.choices[-1], kind.choices[-1]
    if kind.base == "str":
        return "some-text", "some-text"
    value = 9 if kind.base == "int" else 0.25
    return str(value), value


def taking(option: str) -> str:
    return next(name for name, command in COMMANDS.items() if option in command.options())


@pytest.mark.parametrize(
    "alias", [alias for alias in TABLE.aliases.values() if alias.target], ids=lambda alias: alias.name
)
def test_every_other_name_sets_its_option(alias: Alias) -> None:
    option = options()[alias.target or ""]
    word, value = sample(option.kind, option)
    command = taking(option.name)
    for spelling in (f"--{alias.name}", f"--{alias.name.replace('_', '-')}"):
        resolved = resolve(
            command, [spelling, word, *BESIDE.get(option.name, [])], partial=True, planning=True
        )
        assert resolved.value(option.name) == value
        assert str(resolved.sources[option.name]) == spelling


@pytest.mark.parametrize(
    "alias", [alias for alias in TABLE.aliases.values() if alias.targets], ids=lambda alias: alias.name
)
def test_every_command_dependent_name(alias: Alias) -> None:
    for command, target in (alias.targets or {}).items():
        resolved = resolve(command, [f"--{alias.name}", "some-text"], partial=True)
        assert resolved.value(target) in ("some-text", ["some-text"])


@pytest.mark.parametrize(
    "alias", [alias for alias in TABLE.aliases.values() if alias.choices], ids=lambda alias: alias.name
)
def test_every_choice(alias: Alias) -> None:
    assert set(alias.choices or {}) == {True, False}
    for flag, settings in (alias.choices or {}).items():
        command = taking(alias.all_targets()[0])
        for words in ([f"--{alias.name}", str(flag)], [f"--{alias.name}" if flag else f"--no_{alias.name}"]):
            resolved = resolve(command, words, partial=True)
            assert {name: resolved.value(name) for name in settings} == settings
            assert all(resolved.is_explicit(name) for name in settings)


@pytest.mark.parametrize(
    ("option", "word", "meaning"),
    [(option, word, meaning) for option, words in TABLE.values.items() for word, meaning in words.items()],
)
def test_every_other_word_for_a_value(option: str, word: str, meaning: str) -> None:
    resolved = resolve(taking(option), [f"--{option}", word], partial=True, planning=True)
    assert resolved.value(option) in (meaning, [meaning])


@pytest.mark.parametrize("known", TABLE.unsupported.values(), ids=lambda known: known.name)
def test_every_unsupported_option_is_refused_in_a_run_and_reported_in_a_plan(known: Unsupported) -> None:
    words = [f"--{known.name}", "8"]
    with pytest.raises(ConfigError) as caught:
        resolve("sft", words, partial=True)
    assert caught.value.render() == f"--{known.name}: not in this version: {known.say}\n  fix: {known.fix}"
    planned = resolve("sft", words, partial=True, planning=True)
    assert planned.warnings[0] == f"--{known.name}: not in this version: {known.say}; a run refuses it"
    assert planned.warnings[1:] == (
        ["the parallel sizes multiply to 8 devices; this version trains on one"] if known.plan_as else []
    )
    for off in known.off:
        assert resolve("sft", [f"--{known.name}={off}"], partial=True).warnings == []


@pytest.mark.parametrize("known", TABLE.unneeded.values(), ids=lambda known: known.name)
def test_every_unneeded_option_is_accepted_with_a_word(known: Unsupported) -> None:
    resolved = resolve("sft", [f"--{known.name}", "true"], partial=True)
    assert resolved.warnings == [f"--{known.name}: not needed: {known.say}"]


@pytest.mark.parametrize(("option", "word"), TABLE.unsupported_values)
def test_every_unsupported_value(option: str, word: str) -> None:
    why = TABLE.unsupported_values[option, word]
    with pytest.raises(ConfigError) as caught:
        resolve("sft", [f"--{option}", word], partial=True)
    assert caught.value.render() == f"--{option}: not in this version: {word}: {why.say}\n  fix: {why.fix}"
    planned = resolve("sft", [f"--{option}", word], partial=True, planning=True)
    assert planned.value(option) == options()[option].default


def test_model_type_names_the_model_only_when_nothing_else_does() -> None:
    alone = resolve("sft", ["--model_type", "qwen3-7b", "--dataset", "d"])
    assert alone.config.model.model == "qwen3-7b"
    assert str(alone.sources["model"]) == "--model_type"
    both = resolve("sft", ["--model", "path", "--model_type", "qwen3", "--dataset", "d"])
    assert both.config.model.model == "path"
    assert both.warnings == ["--model_type: not needed: model says which model"]


ARTICLES = {
    "1": "--model_type qwen3-7b-chat --dataset alpaca-en --lora_rank 64 --output_dir ./output-qwen3-lora "
    "--num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 16",
    "3": "--model_type qwen3-7b --dataset long-alpaca --max_length 32768 --use_ring_attention True",
    "4": "--model_type qwen3-7b --dataset instruct-en --lora_rank 64 --lora_alpha 32 --quantization_bit 4 "
    "--use_lora True --output_dir ./output-qwen3-qlora",
    "5": "--model_type llama-7b --parallel_method megatron --tensor_parallel_size 4 --pipeline_parallel_size 2 "
    "--deepspeed zero3",
    "6": "--model_type qwen-vl-chat --dataset coco_vqa_zh --max_length 2048 --use_loss_scale --batch_size 16",
    "7": "--model_type llama3-70b --dataset finance_qa_zh --parallel_method megatron --tensor_parallel_size 8 "
    "--deepspeed deepspeed_zero3_config.json --output_dir ./output/llama3-finance",
    "9": "--model_type qwen3-7b --dataset my_rlhf_data --parallel_strategy megatron --tp_size 4 --pp_size 2 "
    "--cp_size 1 --fsdp_num_shards 8 --use_liger_kernel true --max_length 8192",
}
WHAT_ARTICLES_LACK = {
    "1": [],
    "3": ["--use_ring_attention"],
    "4": ["--quantization_bit"],
    "5": ["--parallel_method", "--deepspeed", "--dataset", "the parallel sizes multiply to 8 devices"],
    "6": [],
    "7": ["--parallel_method", "--deepspeed", "the parallel sizes multiply to 8 devices"],
    "9": ["--parallel_strategy", "--fsdp_num_shards", "the parallel sizes multiply to 64 devices"],
}


@pytest.mark.parametrize("number", ARTICLES)
def test_the_articles_commands_are_planned_as_printed(number: str) -> None:
    words = ARTICLES[number].split()
    resolved = resolve("sft", [*words, "--dry_run"])
    assert resolved.value("model") == words[1]
    assert len(resolved.warnings) == len(WHAT_ARTICLES_LACK[number])
    for warning, start in zip(resolved.warnings, WHAT_ARTICLES_LACK[number], strict=True):
        assert warning.startswith(start)
    if WHAT_ARTICLES_LACK[number]:
        with pytest.raises(ConfigError):
            resolve("sft", words)
    else:
        assert resolve("sft", words).config == resolved.config


def test_the_values_of_the_articles_commands_arrive() -> None:
    sixth = resolve("sft", ARTICLES["6"].split())
    assert sixth.value("use_loss_scale") is True
    assert sixth.value("per_device_train_batch_size") == 16
    ninth = resolve("sft", ARTICLES["9"].split(), planning=True)
    assert [ninth.value(name) for name in ("tensor_parallel_size", "pipeline_parallel_size")] == [4, 2]


def test_the_parallel_section_of_article_one() -> None:
    sizes = {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 2,
    }
    resolved = resolve(
        "sft",
        ["--use_megatron=True"],
        values={"model": "m", "dataset": "d", "parallel": sizes},
        planning=True,
    )
    assert {name: resolved.value(name) for name in sizes} == sizes
    assert [warning.split(":")[0] for warning in resolved.warnings] == [
        "--use_megatron",
        "the parallel sizes multiply to 16 devices; this version trains on one",
    ]


def test_the_python_configuration_of_article_two_says_what_is_missing() -> None:
    config = {"model_type": "qwen3-omni-7b", "train_type": "dpo", "dataset": "mm.jsonl", "packing": True}
    with pytest.raises(ConfigError) as caught:
        resolve("sft", values=config)
    assert caught.value.render() == (
        "train_type: not in this version: dpo: preference and reinforcement learning come with a later version\n"
        "  fix: use swift sft with --tuner_type lora or full"
    )


def test_every_refusal_names_the_thing() -> None:
    vague = ("this comes", "this training method", "there is nothing like it")
    assert [known.name for known in TABLE.unsupported.values() if known.say.startswith(vague)] == []


@pytest.mark.parametrize("word", TABLE.mistakes)
def test_words_of_other_tools_say_what_to_do(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("pt", [f"--{word}", "x"], partial=True)
    assert caught.value.message == TABLE.mistakes[word].say
    assert caught.value.fix == TABLE.mistakes[word].fix.replace("COMMAND", "pt")


def test_a_word_that_needs_another_option() -> None:
    alone = resolve("sft", ["--lr_scheduler_type", "cosine_with_min_lr"], partial=True)
    assert alone.value("lr_scheduler_type") == "cosine"
    assert alone.warnings == [
        "--lr_scheduler_type: cosine_with_min_lr is cosine with a --min_lr_ratio, which is not given"
    ]
    words = ["--lr_scheduler_type", "cosine_with_min_lr", "--min_lr_ratio", "0.1"]
    assert resolve("sft", words, partial=True).warnings == []
