"""Plans of swift export: sizes, calibration, toolchains; no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swift.config.bind import resolve
from swift.models.facts import ModelFacts
from swift.plan.export import stored_bytes
from swift.plan.modules import linear_layers, parameter_sizes
from swift.plan.plan import make_plan


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))


def test_a_plan_of_gptq(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "calibration.jsonl"
    data.write_text("".join(json.dumps({"query": "one two", "response": "three"}) + "\n" for _ in range(40)))
    words = [
        "--model",
        str(tiny_model_dir),
        "--quant_method",
        "gptq",
        "--dataset",
        str(data),
        "--group_size",
        "32",
    ]
    plan = make_plan(resolve("export", [*words, "--quant_n_samples", "30"], planning=True))
    part, facts = plan.export, ModelFacts.read(tiny_model_dir)
    assert (part["method"], part["bits"], part["toolchain"], part["toolchain_installed"]) == (
        "gptq",
        4,
        "gptqmodel",
        False,
    )
    assert part["calibration_rows"] == 30 and part["calibration_tokens"] > 30 * 3
    assert part["bytes_before"] == facts.num_parameters * 4
    # By hand: 4 bits a weight, for each group of 32 a 16-bit scale and a 4-bit zero point, an int32 for each input.
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    layer = sum(o * i // 2 + (i // 32) * o * 2 + (i // 32) * o // 2 + 4 * i for o, i in shapes)
    rest = facts.num_parameters - 2 * sum(o * i for o, i in shapes)
    assert part["bytes_after"] == 2 * layer + rest * 4
    assert any("swift toolchain install gptqmodel" in warning for warning in plan.warnings) and plan.fits


@pytest.mark.parametrize(("bits", "slack"), [(4, 0.02), (8, 0.02)])
def test_the_size_of_bitsandbytes_is_that_of_the_folder(
    tiny_model_dir: Path, tmp_path: Path, bits: int, slack: float
) -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    from swift.models.load import load_model

    words = ["--model", str(tiny_model_dir), "--quant_method", "bnb", "--quant_bits", str(bits)]
    resolved = resolve("export", words)
    model = load_model(tiny_model_dir, dtype=torch.float32, quantization=resolved.config.quantization)
    model.save_pretrained(tmp_path / "out")
    facts = ModelFacts.read(tiny_model_dir)
    layers = linear_layers(facts, parameter_sizes(tiny_model_dir))
    header = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size - header
    assert stored_bytes(resolved, facts, layers, "float32") == pytest.approx(size, rel=slack)


def test_what_a_run_would_refuse_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan(
        resolve(
            "export",
            "--model_type llama3-70b --quant_method gptq --output_format vllm".split(),
            planning=True,
        )
    )
    assert plan.export["bytes_before"] > 3 * plan.export["bytes_after"]
    assert plan.export["calibration_from"].startswith("documentation of Python's standard library")
    plan = make_plan(
        resolve("export", ["--model", "x", "--quant_method", "bnb", "--output_format", "vllm"], planning=True)
    )
    assert any("vLLM does not load bitsandbytes" in warning for warning in plan.warnings)


def test_planning_imports_no_torch(tiny_model_dir: Path) -> None:
    code = (
        "import sys; from swift.cli.main import main;"
        f"code = main(['plan', 'export', '--model', {str(tiny_model_dir)!r}, '--quant_method', 'awq']);"
        "assert code == 0 and not {'torch', 'transformers'} & set(sys.modules), code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "awq, 4 bits, groups of 128" in done.stdout
