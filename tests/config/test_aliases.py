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
    "loss_type": ["--task_type", "reranker"],
    "dataset_weights": ["--dataset", "d"],
    "galore_target_modules": ["--optim", "galore_adamw"],
    "streaming": ["--max_steps", "5"],
    "adalora_deltaT": ["--tuner_type", "adalora"],
    "adalora_delta_t": ["--tuner_type", "adalora"],
    "lora_ga_scale": ["--init_weights", "lora-ga"],
    "bnb_4bit_compute_dtype": ["--quant_method", "bnb", "--quant_bits", "4"],
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
    if option.name == "metric":
        return "numeric", "numeric"
    if option.name == "init_weights":  # texts, because pissa_niter_N has no end
        return "pissa_niter_16", "pissa_niter_16"
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
        kind = options()[target].kind.item or options()[target].kind
        word = (
            "7" if kind.base in ("int", "float") else "sigmoid" if "sigmoid" in kind.choices else "some-text"
        )
        value = 7 if word == "7" else word
        resolved = resolve(command, [f"--{alias.name}", word], partial=True)
        assert resolved.value(target) in (value, [value])


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
    words = [f"--{option}", word, *BESIDE.get(option, [])]
    resolved = resolve(taking(option), words, partial=True, planning=True)
    assert resolved.value(option) in (meaning, [meaning])


@pytest.mark.parametrize("known", TABLE.unsupported.values(), ids=lambda known: known.name)
def test_every_unsupported_option_is_refused_in_a_run_and_reported_in_a_plan(known: Unsupported) -> None:
    words = [f"--{known.name}", "8"]
    with pytest.raises(ConfigError) as caught:
        resolve("sft", words, partial=True)
    assert caught.value.render() == f"--{known.name}: not in this version: {known.say}\n  fix: {known.fix}"
    planned = resolve("sft", words, partial=True, planning=True)
    assert planned.warnings[0] == f"--{known.name}: not in this version: {known.say}; a run refuses it"
    assert planned.warnings[1:] == []
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
        resolve(taking(option), [f"--{option}", word], partial=True)
    assert caught.value.render() == f"--{option}: not in this version: {word}: {why.say}\n  fix: {why.fix}"
    planned = resolve(taking(option), [f"--{option}", word], partial=True, planning=True)
    assert planned.sources[option].kind in ("default", "derived")


def test_model_type_names_the_model_only_when_nothing_else_does() -> None:
    alone = resolve("sft", ["--model_type", "qwen3-7b", "--dataset", "d"])
    assert alone.config.model.model == "qwen3-7b"
    assert str(alone.sources["model"]) == "--model_type"
    both = resolve("sft", ["--model", "path", "--model_type", "qwen3", "--dataset", "d"])
    assert both.config.model.model == "path"
    assert both.warnings == ["--model_type: not needed: model says which model"]


def test_the_python_configuration_of_article_two_says_what_is_missing() -> None:
    config = {"model_type": "qwen3-omni-7b", "train_type": "dpo", "dataset": "mm.jsonl", "packing": True}
    with pytest.raises(ConfigError) as caught:
        resolve("sft", values=config)
    assert caught.value.render() == (
        "train_type: not in this version: dpo: that is another command\n"
        "  fix: use swift rlhf --rlhf_type dpo, with --tuner_type lora or full"
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
    for rate in (["--min_lr_ratio", "0.1"], ["--min_lr", "1e-5"]):
        resolved = resolve("sft", ["--lr_scheduler_type", "cosine_with_min_lr", *rate], partial=True)
        assert resolved.warnings == []
        assert resolved.value("min_lr_ratio") == pytest.approx(0.1)


def test_aot_pair_is_the_unpaired_form():
    """TRL renamed it for what it compares: sorted log-ratios of chosen and of rejected answers."""
    values = {"model": "m", "dataset": "d", "loss_type": "aot_pair"}
    assert resolve("rlhf", values=values).config.rlhf.rlhf_loss_type == ["aot_unpaired"]
