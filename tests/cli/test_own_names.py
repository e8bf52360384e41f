"""Names that users give: the articles' commands run as printed, two steps, over a tiny model and a small data set.

Commands 2, 3, 5, 7 and 9 need several devices and join when these exist; 8 and 10 quantise in a toolchain: see
tests/extras/test_toolchain_export.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from tests.config.test_articles import COMMANDS

from swift.cli.main import main
from swift.config.bind import load_run_config
from swift.core.errors import ModelError
from swift.models.registry import own_folder, own_models
from swift.runs.metrics import read_metrics

MODELS = {"1": "qwen3-7b-chat", "4": "qwen3-7b", "6": "qwen-vl-chat"}
DATA = {"1": "alpaca-en", "4": "instruct-en", "6": "coco_vqa_zh"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "datasets").mkdir(parents=True)
    return tmp_path / "home"


@pytest.mark.parametrize("number", list(MODELS))
def test_commands_of_the_articles_run(home: Path, tiny_model_dir: Path, number: str) -> None:
    rows = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}"} for n in range(48)]
    (home / "datasets" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    entry = {"path": "rows.jsonl", "columns": ["instruction", "input", "output"]}
    (home / "datasets" / "own.yaml").write_text(yaml.safe_dump({DATA[number]: entry}), encoding="utf-8")
    (home / "models.yaml").write_text(f"{MODELS[number]}: {tiny_model_dir}\n", encoding="utf-8")
    assert main([*shlex.split(COMMANDS[number]), "--max_steps", "2"]) == 0
    run = next(path.parent for path in Path().rglob("summary.json"))
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    config = load_run_config(run).config
    assert config.model.model == str(tiny_model_dir)
    assert config.tuner.lora_rank == (8 if number == "6" else 64)
    assert config.quantization.quant_bits == (4 if number == "4" else None)


def test_a_name_means_its_folder(
    home: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    assert own_models() == {}
    (home / "models.yaml").write_text(f"my-base: {tiny_model_dir}\nqwen3-8b: near\n", encoding="utf-8")
    assert own_folder("My_Base") == tiny_model_dir
    assert own_folder("qwen3-8b") == home / "near"  # before the table of short names
    assert main(["models", "show", "my-base"]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    assert main(["models", "ls", "my-*"]) == 0
    assert capsys.readouterr().out == f"my-base\t{tiny_model_dir}\n"
    (home.parent / "my-base").mkdir()
    assert own_folder("my-base") is None  # a folder here is meant before it


def test_a_base_model_without_a_template_gets_the_one_of_its_name(home: Path, tiny_model_dir: Path) -> None:
    (home / "chat.jsonl").write_text('{"query": "one two", "response": "three"}\n' * 4, encoding="utf-8")
    for number, has_template in enumerate((False, True)):
        folder = home / f"base{number}"
        shutil.copytree(tiny_model_dir, folder)
        if not has_template:
            (folder / "chat_template.jinja").unlink()
        (home / "models.yaml").write_text(f"yi-6b: {folder}\n", encoding="utf-8")
        words = [
            "--model",
            "yi-6b",
            "--dataset",
            str(home / "chat.jsonl"),
            "--max_steps",
            "1",
            "--run_name",
            f"r{number}",
        ]
        assert main(["sft", *words]) == 0
        config = load_run_config(Path("output") / f"r{number}").config
        assert config.template.chat_template == (None if has_template else "chatml")
    checkpoint = Path("output/r0/last")
    assert "im_start" in (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")


def test_a_tiny_model_replaces_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home.parent / "mine").mkdir()
    assert main(["models", "tiny", "llama", "mine"]) == 2
    assert "mine exists" in capsys.readouterr().err
    assert main(["models", "tiny", "llama", "mine", "--overwrite"]) == 0


def test_a_damaged_table_is_named(home: Path) -> None:
    (home / "models.yaml").write_text("my-base: [1]\n", encoding="utf-8")
    with pytest.raises(ModelError, match="not a table of models") as error:
        own_folder("my-base")
    assert error.value.where == str(home / "models.yaml")
