"""The tables behind everything: options, commands, reference page, completion scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from swift.cli.table import load_command
from swift.config.aliases import alias_table
from swift.config.commands import COMMANDS, LATER_COMMANDS
from swift.config.completion import completion_script
from swift.config.kinds import kind_of
from swift.config.reference import reference_page
from swift.config.schema import SECTIONS, Config, options

REFERENCE = Path(__file__).parents[2] / "docs" / "en" / "reference.md"


def test_every_option_is_described_and_of_a_known_kind() -> None:
    for option in options().values():
        assert option.help.endswith(".")
        assert option.kind.base in ("bool", "int", "float", "str", "choice", "list", "dict")
        assert option.section in Config.model_fields


def test_options_have_one_type() -> None:
    with pytest.raises(TypeError, match="one type"):
        kind_of(int | str)
    with pytest.raises(TypeError, match="cannot have the type"):
        kind_of(bytes)


def test_commands_name_options_that_exist() -> None:
    for command in COMMANDS.values():
        named = {*command.extra, *command.without, *(name for group in command.required for name in group)}
        assert named <= set(options())
        assert set(command.sections) <= set(SECTIONS)
        assert command.own_arguments == (not command.options())
        assert set(command.switches).isdisjoint(options())
        assert callable(load_command(command))


def test_later_commands_are_not_there_yet() -> None:
    assert set(LATER_COMMANDS).isdisjoint(COMMANDS)


def test_every_training_option_belongs_to_a_command() -> None:
    taken = {name for command in COMMANDS.values() for name in command.options()}
    assert taken == set(options())


def test_sections_of_other_names_do_not_hide_options() -> None:
    assert set(alias_table().sections).isdisjoint(options())


def test_the_reference_page_is_current() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference_page(), "run: swift config reference"


def test_the_reference_page_names_everything() -> None:
    page = reference_page()
    for name in [*options(), *alias_table().aliases, *alias_table().unsupported, *alias_table().unneeded]:
        assert f"`{name}`" in page
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_every_option(shell: str) -> None:
    script = completion_script(shell)
    for command in COMMANDS.values():
        assert command.name in script
        for name in command.options():
            assert (f"-l {name} " if shell == "fish" else f"--{name}") in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["swift", "mer"], {"merge-lora"}),
        (["swift", "sft", "--lora_r"], {"--lora_rank"}),
        (["swift", "sft", "--save_strategy", ""], {"steps", "epoch", "no"}),
        (["swift", "config", "co"], {"completion"}),
        (["swift", "infer", "--lora_rank"], set()),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    array = " ".join(f"'{word}'" for word in words)
    script = (
        f"{completion_script('bash')}\nCOMP_WORDS=({array})\nCOMP_CWORD={len(words) - 1}\n_swift\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == expected
