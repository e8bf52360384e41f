"""Help: what it lists, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swift.config.commands import COMMANDS
from swift.config.help import command_help, general_help, options_about
from swift.config.schema import options
from swift.core.errors import UsageError

SFT = COMMANDS["sft"]


def flags(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


def test_bare_help_lists_about_25_essential_options() -> None:
    listed = flags(command_help(SFT))
    assert 22 <= len(listed) <= 32
    for name in ("infer", "deploy", "merge-lora", "export", "eval"):
        assert "--adapters" in flags(command_help(COMMANDS[name]))
    assert {"--model", "--dataset", "--lora_rank", "--learning_rate", "--output_dir", "--dry_run"} <= set(
        listed
    )


def test_help_all_lists_every_option_once() -> None:
    assert flags(command_help(SFT, "all")) == [f"--{name}" for name in (*SFT.options(), *SFT.switches)]


def test_help_on_a_topic() -> None:
    assert flags(command_help(SFT, "checkpoint")) == [
        f"--{option.name}" for option in options().values() if option.section == "checkpoint"
    ]
    lora = flags(command_help(SFT, "lora"))
    assert {"--lora_rank", "--target_modules", "--learning_rate"} <= set(lora)
    assert "--save_steps" not in lora
    assert flags(command_help(SFT, "--batch-size")) == [
        "--lora_ga_batch_size",
        "--per_device_train_batch_size",
        "--global_batch_size",
        "--per_device_eval_batch_size",
    ]
    assert [option.name for option in options_about("use_lora", SFT.options().values())] == ["tuner_type"]


def test_defaults_units_and_other_names_are_shown() -> None:
    text = " ".join(command_help(SFT, "lora_rank").split())
    assert "--lora_rank INT Rank of LoRA, LoHa, LoKr and Bone. [8] Also: --lora_r, --adapter_rank." in text
    assert "In tokens." in command_help(SFT, "max_length")
    assert "[true]" in command_help(SFT, "group_by_length")


def test_an_unknown_topic() -> None:
    with pytest.raises(UsageError) as caught:
        command_help(SFT, "checkpont")
    assert (
        caught.value.render()
        == "--help checkpont: no option is about this\n  fix: did you mean --help checkpoint?"
    )


def test_general_help_lists_every_command() -> None:
    text = general_help()
    for name, command in COMMANDS.items():
        assert f"  {name:<12}{command.help}" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    longest = max(len(line) for line in command_help(SFT, "all").splitlines() if not line.startswith("  --"))
    assert longest <= min(width, 120)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["sft", "--help"],
        ["sft", "--help", "all"],
        ["infer", "--help", "lora"],
        ["plan", "--help"],
        ["config", "schema"],
        ["config", "show", "sft", "--lora_rank", "4"],
        ["sft", "--lora_rnk", "3"],
    ],
)
def test_nothing_heavy_is_imported(argv: list[str]) -> None:
    code = (
        "import sys, json\n"
        "from swift.cli.main import main\n"
        f"main({argv!r})\n"
        "print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(process.stdout.splitlines()[-1]))
    assert "swift.cli.main" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "tokenizers", "peft", "numpy", "rich", "pyarrow"})
