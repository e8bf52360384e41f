"""The README's commands do what it says: they are executed as written, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")


@dataclass(frozen=True)
class Block:
    """One fenced block marked ``<!-- test -->`` or ``<!-- test: FILE -->``."""

    language: str
    text: str
    file: str | None


def blocks(readme: str) -> list[Block]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.findall(r"<!-- test(?:: (\S+))? -->\n```(\w+)\n(.*?)```", text, re.DOTALL)
    return [Block(language, body, file or None) for file, language, body in found]


def commands(block: Block) -> list[str]:
    if block.language == "python":
        return [f"python - <<'END'\n{block.text}END"]
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


@pytest.fixture
def demo_folder(tmp_path: Path) -> Path:
    """A working folder with what ``swift demo`` leaves, made without training."""
    from swift.demo.run import BATCH_SIZE, DEMO_MODEL, NUM_HELDOUT
    from swift.demo.task import TOKENIZER_TEXTS, write_task
    from swift.models.tiny import make_tiny_model

    write_task(tmp_path / "demo", num_train=200 * BATCH_SIZE, num_heldout=NUM_HELDOUT, seed=42)
    make_tiny_model(tmp_path / "demo" / "model", texts=TOKENIZER_TEXTS, seed=42, **DEMO_MODEL)
    return tmp_path


def test_commands_run_as_written(demo_folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    outputs: dict[str, str] = {}
    for block in blocks("README.md"):
        if block.file:
            (demo_folder / block.file).write_text(block.text, encoding="utf-8")
            continue
        for command in commands(block):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=demo_folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            assert done.stdout, command
            outputs[command.split(" --")[0]] = done.stdout
    assert "25600 rows, all of them good" in outputs["swift data check demo/train.jsonl"]
    assert (
        "step 150 of 150" in outputs["swift resume output/first"]
        or "150/150" in outputs["swift resume output/first"]
    )
    learned = re.search(r"exact_match +([\d.]+)", outputs["swift infer"])
    assert learned and float(learned[1]) > 0.5
    assert (demo_folder / "output" / "first-merged" / "model.safetensors").is_file()
    assert "--lora_rank" in outputs["swift config show sft run.yaml"]


def test_both_languages_have_the_same_blocks() -> None:
    first, second = (blocks(readme) for readme in READMES)
    assert first == second
    assert len(first) >= 6


@pytest.mark.parametrize("readme", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(readme: str) -> None:
    path = ROOT / readme
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("readme", [*READMES, "CONTRIBUTING.md"])
def test_make_targets_exist(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z-]+)`?", (ROOT / readme).read_text(encoding="utf-8")))
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
