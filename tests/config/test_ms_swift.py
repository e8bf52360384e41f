"""What people bring from ms-swift: every documented option is known; its commands plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swift.cli.fit import command_meant, megatron_words
from swift.cli.main import main
from swift.config.aliases import alias_table
from swift.config.bind import command_of_train_type, resolve
from swift.config.commands import LATER_COMMANDS
from swift.config.schema import options
from swift.core.errors import UsageError

DATA = Path(__file__).parent / "data"


def documented_options() -> dict[str, str]:
    """Option -> group, from the list of names."""
    known: dict[str, str] = {}
    group = ""
    for line in (DATA / "ms_swift_options.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        head = re.match(r"(\w+): (.*)", line)
        if head:
            group, line = head[1], head[2]
        known.update(dict.fromkeys(line.split(), group))
    return known


def test_every_documented_option_is_known() -> None:
    table = alias_table()
    known = {*options(), *table.aliases, *table.unsupported, *table.unneeded}
    documented = documented_options()
    assert len(documented) > 850
    assert {name: group for name, group in documented.items() if name not in known} == {}


@pytest.mark.parametrize("name", [name for name in LATER_COMMANDS if name != "web-ui"])
def test_later_commands_are_planned_and_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [name, "--model", "no-such-model", "--dataset", "no-such-file.jsonl"]
    assert main(words) == 2
    assert f"swift {name} comes with a later version" in capsys.readouterr().err
    assert main([*words, "--dry_run"]) == 0
    assert f"swift {name} comes with a later version" in capsys.readouterr().out


def test_options_of_one_subject_share_one_warning() -> None:
    words = [
        "--rlhf_type",
        "grpo",
        "--model",
        "m",
        "--dataset",
        "d",
        "--vllm_server_host",
        "h",
        "--max_turns",
        "2",
    ]
    resolved = resolve("rlhf", words, planning=True)
    assert resolved.warnings == [
        "--vllm_server_host, --max_turns: not in this version: answers are sampled by the embedded engine, in this "
        "process; servers and several turns come with a later version; a run refuses them",
    ]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--train_type", "pt"], "pt"),
        (["--train_type=dpo"], "rlhf"),
        (["--train-type", "SFT", "--lora_rank", "4"], "sft"),
        (["--train_type", "lora"], None),
        (["--lora_rank", "4"], None),
    ],
)
def test_train_type_says_which_command_is_meant(words: list[str], command: str | None) -> None:
    assert command_of_train_type(words) == command
    assert command_meant("fit", words) == (command or "sft", words)


def test_train_type_in_a_file_and_in_python(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("tuner:\n  train_type: pt\nmodel: m\n", encoding="utf-8")
    assert command_of_train_type([str(file)]) == "pt"
    assert command_of_train_type([str(file), "--train_type", "grpo"]) == "rlhf"
    assert command_of_train_type(values={"train_type": "pt"}) == "pt"


def test_a_train_type_that_repeats_the_command_changes_nothing() -> None:
    words = ["--model", "m", "--dataset", "d"]
    assert resolve("sft", [*words, "--train_type", "sft"]).config == resolve("sft", words).config


def test_config_names_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rank: 4\n", encoding="utf-8")
    for words in (["--config", str(file)], [f"--config={file}"]):
        resolved = resolve("sft", [*words, "--model", "m", "--dataset", "d"])
        assert resolved.value("lora_rank") == 4
        assert resolved.files == [str(file)]


def test_megatron_commands() -> None:
    assert megatron_words(["sft", "--model", "m"]) == (
        "sft",
        ["--model", "m", "--use_megatron=true", "--tuner_type=full"],
    )
    words = [
        "sft",
        "--train_type",
        "lora",
        "--micro_batch_size",
        "2",
        "--global_batch_size",
        "16",
        "--lr",
        "1e-5",
    ]
    command, rest = megatron_words([*words, "--min_lr", "1e-6", "--model", "m", "--dataset", "d"])
    resolved = resolve(command, rest, planning=True)
    names = ("tuner_type", "per_device_train_batch_size", "gradient_accumulation_steps", "min_lr_ratio")
    assert [resolved.value(name) for name in names] == ["lora", 2, 8, pytest.approx(0.1)]
    with pytest.raises(UsageError, match="which command"):
        megatron_words([])
