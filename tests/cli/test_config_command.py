"""``swift config``: every action, its output and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift.cli.main import main


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return main(["config", *words])


def test_show_prints_values_with_their_sources(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "run.yaml").write_text("command: pt\nmodel: m\nlora_rank: 4\n")
    assert run("show", "run.yaml", "--packing") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["command:", "pt"] in lines
    assert ["lora_rank", "4", "run.yaml:3"] in lines
    assert ["packing", "true", "--packing"] in lines
    assert ["gradient_accumulation_steps", "4", "derived", "from", "packing"] in lines
    assert not any(line[:1] == ["lora_alpha"] for line in lines)


def test_show_all_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "infer", "--model", "m", "--all", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["command"] == "infer"
    assert shown["values"]["model"] == {"value": "m", "source": "--model"}
    assert shown["values"]["temperature"] == {"value": 0.0, "source": "default"}
    assert "lora_rank" not in shown["values"]


def test_show_warns_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--zero_hpz_partition_size", "8") == 0
    assert capsys.readouterr().err.startswith("warning: --zero_hpz_partition_size: not in this version:")
    assert run("show", "--lora_rnk", "3") == 2
    assert capsys.readouterr().err == "error: --lora_rnk: unknown option\n  fix: did you mean --lora_rank?\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("use_lora", "use_lora: true: tuner_type=lora; false: tuner_type=full\n"),
        ("--learning-rate", "learning_rate: option of section training. "),
        ("lr", "lr: learning_rate\n"),
        ("model_type", "model_type: model (when that is not set)\n"),
        ("fsdp_config", "fsdp_config: not in this version: what it holds are options here"),
        ("hub_strategy", "hub_strategy: not needed: models and data are read from local folders\n"),
        ("evaluation", "evaluation: the section evaluation\n"),
        ("ckpt_dir", "ckpt_dir: pt: resume_from_checkpoint, sft: resume_from_checkpoint, rlhf: resume_from_"),
    ],
)
def test_alias(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("alias", name) == 0
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["alias", "lorarank"], "error: lorarank: unknown option\n  fix: did you mean lora_rank?\n"),
        (
            ["shw"],
            "error: swift config: 'shw' is not one of show, alias, schema, reference, completion\n"
            "  fix: did you mean show?\n",
        ),
        (["reference", "--chek"], "error: --chek: unknown option\n  fix: did you mean --check?\n"),
        (["reference", "--che"], "error: --che: unknown option\n  fix: did you mean --check?\n"),
        (
            ["completion", "bsh"],
            "error: swift config completion: 'bsh' is not one of bash, zsh, fish\n  fix: did you mean bash?\n",
        ),
        (["schema", "sftt"], "error: unknown command 'sftt'\n  fix: did you mean swift sft?\n"),
        (["schema", "sft", "x"], "error: 'x': one word too many\n"),
        (["schema", "doctor"], "error: doctor: swift doctor takes no configuration file\n"),
    ],
)
def test_wrong_usage(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err == expected


def test_schema_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema", "sft") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "swift sft"
    assert "lora_rank" in schema["properties"]["tuner"]["properties"]


def test_reference_is_written_checked_and_found_stale(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = workspace / "docs" / "en" / "reference.md"
    assert run("reference", "--check") == 1
    assert run("reference") == 0
    assert run("reference", "--check") == 0
    page.write_text(page.read_text() + "more\n")
    assert run("reference", "--check") == 1
    assert capsys.readouterr().err.endswith("is not current; run: swift config reference\n")


def test_completion_prints_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", "fish") == 0
    assert "complete -c swift" in capsys.readouterr().out


def test_help_of_an_action(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("show", "--help")
    assert caught.value.code == 0
    assert "swift config show [COMMAND] [FILE.yaml ...]" in " ".join(capsys.readouterr().out.split())
