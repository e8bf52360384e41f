"""Real exports in the toolchains gptqmodel and llmcompressor, where they are installed (minutes on a busy machine)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.config.test_articles import COMMANDS

from swift.cli.main import main
from swift.config.bind import resolve
from swift.models.tiny import make_tiny_model
from swift.quantize.export import export
from swift.quantize.methods import check_for_vllm
from swift.toolchains.toolchain import ToolchainError, find_toolchain, toolchain_folder

SIZES = {"intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def need(name: str) -> None:
    try:
        find_toolchain(name)
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    return make_tiny_model(folder, architecture="llama", hidden_size=128, num_layers=3, config=SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calibration.jsonl"
    rows = [
        {"query": f"What is {n} plus {n}?", "response": f"{n} plus {n} is {2 * n}. " * 8} for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(model: Path, data: Path, method: str, output: Path) -> list[str]:
    found = [
        "--model_dir",
        str(model),
        "--quant_method",
        method,
        "--output_dir",
        str(output),
        "--device",
        "cpu",
    ]
    if method != "fp8":
        found += ["--dataset", str(data), "--quant_n_samples", "16"]
    return [*found, "--parity_tokens", "1024", "--output_format", "vllm"]


@pytest.mark.parametrize(
    ("method", "toolchain", "smaller"),
    [
        ("gptq", "gptqmodel", 3),
        ("awq", "gptqmodel", 3),
        ("fp8", "llmcompressor", 2),
        ("w8a8", "llmcompressor", 2),
    ],
)
def test_a_method(
    model: Path, data: Path, tmp_path: Path, method: str, toolchain: str, smaller: float
) -> None:
    need(toolchain)
    folder, report = export(resolve("export", words(model, data, method, tmp_path / method)))
    assert report.loads[f"toolchain {toolchain}"] == "yes" and check_for_vllm(folder) == []
    assert 0 < report.difference.kl < 0.01 and report.difference.same_choice > 0.9
    assert report.bytes_before > smaller * report.bytes_after * 0.6
    assert report.kept is not None and not any("proj" in name for name in report.kept.names)
    assert "/tmp" not in (folder / "config.json").read_text()


def test_a_killed_gptq_goes_on_with_the_next_layer(model: Path, data: Path, tmp_path: Path) -> None:
    need("gptqmodel")
    command = [sys.executable, "-m", "swift", "export", *words(model, data, "gptq", tmp_path / "g")]
    process = subprocess.Popen(command, start_new_session=True)
    layers, deadline = tmp_path / ".g.export" / "scratch" / "layers", time.monotonic() + 900
    while not (layers / "CURRENT").exists():  # a finished layer
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "g").exists()
    _, report = export(resolve("export", words(model, data, "gptq", tmp_path / "g")))
    assert report.settings["resumable"] and report.difference.kl < 0.01
    assert not (tmp_path / ".g.export").exists()


@pytest.mark.parametrize("number", ["8", "10"])
def test_commands_of_the_articles_export(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """As printed; the names mean a tiny model and a few rows."""
    need("gptqmodel")
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    (home / "datasets").mkdir(parents=True)
    (home / "toolchains").symlink_to(toolchain_folder("gptqmodel").parent)
    monkeypatch.setenv("SWIFT_HOME", str(home))
    rows = [{"query": f"What is {n} plus {n}?", "response": f"It is {2 * n}. " * 8} for n in range(40)]
    (home / "datasets" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = {"path": "rows.jsonl", "columns": ["query", "response"]}
    (home / "datasets" / "own.yaml").write_text(json.dumps({"calibration_dataset": entry}))
    (home / "models.yaml").write_text(f"llama3-70b: {model}\n")
    shutil.copytree(model, tmp_path / "output" / "qwen3-7b-sft")
    assert main([*shlex.split(COMMANDS[number]), "--quant_n_samples", "16", "--device", "cpu"]) == 0
