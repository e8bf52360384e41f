"""swift export from start to end with bitsandbytes, and with a stand-in for a toolchain."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from swift.cli import export as export_command
from swift.config.bind import resolve
from swift.core.errors import ConfigError, SwiftError
from swift.models.load import load_model, load_template, load_tokenizer
from swift.quantize.export import export
from swift.toolchains.toolchain import ToolchainError
from swift.train.run import train

pytest.importorskip("bitsandbytes")


def quiet(text: str) -> None:
    """Nothing is said."""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    words = "one two three red blue green cat dog bird".split()
    draw = random.Random(1)
    rows = [
        {"query": f"Say {number}", "response": " ".join(draw.choices(words, k=6))} for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def lora_run(tiny_model_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "model": str(tiny_model_dir), "dataset": str(chat_file), "split_dataset_ratio": 0.25, "output_dir": str(folder),
        "run_name": "lora", "max_steps": 4, "learning_rate": 1e-2, "device": "cpu", "num_threads": 1,
        "load_from_cache_file": False,
    }  # fmt: skip
    return train(resolve("sft", values=values), say=quiet).folder


def options(model: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model",
        str(model),
        "--output_dir",
        str(output),
        "--device",
        "cpu",
        "--parity_tokens",
        "600",
        *more,
    ]


@pytest.mark.parametrize(("bits", "marks"), [("4", "quant_map"), ("8", "SCB")])
def test_bitsandbytes(
    tiny_model_dir: Path, tmp_path: Path, bits: str, marks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = options(
        tiny_model_dir, output, "--quant_method", "bnb", "--quant_bits", bits, "--quant_exclude", "down_proj"
    )
    assert export_command.run(words) == 0
    report = json.loads((output / "parity.json").read_text())
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "same choice" in printed and report["loads"]["transformers"] == "yes"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["out"]

    # The figures again, from the two folders and with functions of torch alone.
    before, after = (load_model(folder, dtype=torch.float32) for folder in (tiny_model_dir, output))
    from pydoc_data.topics import topics

    ids = load_tokenizer(output)(
        ["\n\n".join(topics[name] for name in sorted(topics))], add_special_tokens=False
    )
    window = torch.tensor([ids["input_ids"][0][:512]])
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(window).logits[0, :-1], window[0, 1:]).item() for model in (before, after)
        ]
    found = report["difference"]
    assert found["num_positions"] == 512
    assert found["perplexity_before"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert found["perplexity_after"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert found["kl"] > 0 and found["max"] > 0

    kept = set(report["kept"]["names"])
    assert {
        f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)
    } < kept and "model.embed_tokens.weight" in kept
    assert not any("q_proj" in name for name in kept)
    state = after.state_dict()
    assert any(marks in name for name in state if "up_proj" in name) and not any(
        marks in n for n in state if "down_proj" in n
    )
    assert 0.3 < report["kept"]["share"] < 0.6 and report["bytes_after"] < report["bytes_before"]
    assert load_tokenizer(output).chat_template == load_tokenizer(tiny_model_dir).chat_template


def test_an_adapter_is_merged_into_full_precision_first(lora_run: Path, tmp_path: Path) -> None:
    words = ["--adapters", str(lora_run), "--quant_method", "bnb", "--quant_bits", "8", "--device", "cpu"]
    said: list[str] = []
    folder, report = export(resolve("export", [*words, "--output_dir", str(tmp_path / "int8")]), said.append)
    assert report.merge is not None and report.merge["relative"] < 1e-3
    assert "(as in the run)" in report.text and report.difference.num_labels < report.difference.num_positions
    merged, _ = export(
        resolve(
            "export",
            [
                "--adapters",
                str(lora_run),
                "--merge_lora",
                "true",
                "--output_dir",
                str(tmp_path / "m"),
                "--device",
                "cpu",
            ],
        ),
        said.append,
    )
    ids = torch.arange(30)[None]
    with torch.no_grad():
        full, int8, base = (
            load_model(path, dtype=torch.float32)(ids).logits
            for path in (
                merged,
                folder,
                json.loads((lora_run / "last" / "adapter_config.json").read_text())[
                    "base_model_name_or_path"
                ],
            )
        )
    assert (int8 - full).abs().mean() < 0.2 * (base - full).abs().mean()
    record = json.loads((merged / "parity.json").read_text())
    assert record["method"] == "merge" and record["passed"] and record["difference"]["perplexity_before"] > 1


def test_past_a_limit_the_exit_code_is_1(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(
        tiny_model_dir, tmp_path / "out", "--quant_method", "bnb", "--max_kl", "1e-9", "--min_agreement", "1"
    )
    assert export_command.run(words) == 1
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert not report["passed"] and report["broken"][0].startswith("KL divergence")
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists already"):
        export_command.run(words)


@pytest.mark.parametrize(
    ("words", "says", "fix"),
    [
        ([], "nothing to do", "--quant_method"),
        (
            ["--quant_method", "gptq"],
            "toolchain gptqmodel is not installed",
            "swift toolchain install gptqmodel",
        ),
        (
            ["--quant_method", "w8a8"],
            "llmcompressor is not installed",
            "swift toolchain install llmcompressor",
        ),
        (["--quant_method", "awq", "--quant_bits", "8"], "awq stores 4 bits, not 8", "--quant_bits 4"),
        (["--quant_method", "torchao"], "writes no model folder", "--quant_method"),
        (["--quant_method", "bnb", "--output_format", "vllm"], "vLLM does not load bitsandbytes", "gptq"),
        (["--quant_method", "bnb", "--group_size", "64"], "no effect with quant_method bnb", "leave it out"),
        (
            ["--quant_method", "gptq", "--bnb_4bit_quant_type", "fp4"],
            "no effect with quant_method gptq",
            "leave",
        ),
        (["--merge_lora", "true", "--quant_exclude", "q_proj"], "no effect on a merge", "leave it out"),
        (["--merge_lora", "true"], "no adapter to merge", "--adapters"),
        (["--quant_method", "gguf"], "GGUF comes with a later version", "llama.cpp"),
        (
            ["--quant_method", "bnb", "--push_to_hub", "true"],
            "upload to a hub comes with a later version",
            "leave",
        ),
        (["--quant_method", "bnb", "--quant_exclude", "q_porj"], "no linear layer is called q_porj", None),
        (["--quant_method", "bnb", "--quantize_lm_head", "true"], "head is the embedding", "leave it out"),
    ],
)
def test_refusals(tiny_model_dir: Path, tmp_path: Path, words: list[str], says: str, fix: str | None) -> None:
    with pytest.raises(SwiftError, match=says) as caught:
        export(resolve("export", options(tiny_model_dir, tmp_path / "out", *words)), quiet)
    assert fix is None or fix in (caught.value.fix or "")
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


# -- a toolchain's part, played by a stand-in ---------------------------------------------------------------


class StandIn:
    """Answers as the workers of gptqmodel would; its weights are those of the original, rounded to 1/64."""

    name = "gptqmodel"

    def __init__(self, fail_at: str | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fail_at = fail_at

    def run(self, script: Path, payload: dict[str, Any], **settings: Any) -> dict[str, Any]:
        self.calls.append((script.name, payload))
        if script.name == self.fail_at:
            raise ToolchainError(f"{script.name} was killed by signal 9")
        if script.name == "forward.py":
            from swift.models.compare import Probe, model_logits, store_logits

            model = load_model(Path(payload["model"]) / "plain", dtype=torch.float32)
            store_logits(model_logits(model, map(Probe.text, payload["probes"])), Path(payload["output"]))
            return {}
        model = load_model(payload["model"], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 64).round() / 64)
        output = Path(payload["output"])
        model.save_pretrained(output / "plain")
        shutil.copy(output / "plain" / "model.safetensors", output)
        config = json.loads((output / "plain" / "config.json").read_text())
        stored = {
            "quant_method": payload["method"],
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "dynamic": {"-:x": {}},
        }
        (output / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        return {"resumable": False, "peak_bytes": 1}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def use(**settings: Any) -> StandIn:
        made = StandIn(**settings)

        def find(name: str) -> StandIn:
            if name == "gptqmodel":
                return made
            raise ToolchainError(
                f"the toolchain {name} is not installed", fix=f"swift toolchain install {name}"
            )

        monkeypatch.setattr("swift.quantize.export.find_toolchain", find)
        return made

    return use


def test_calibration_rows_are_the_runs_own_tokens(
    lora_run: Path, chat_file: Path, tmp_path: Path, stand_in: Callable[..., StandIn]
) -> None:
    toolchain, said = stand_in(), []
    words = [
        "--model",
        str(lora_run),
        "--quant_method",
        "awq",
        "--group_size",
        "64",
        "--quant_exclude",
        "v_proj",  # 32 outputs
        "--quant_n_samples",
        "7",
        "--output_format",
        "vllm",
    ]
    folder, report = export(
        resolve("export", [*words, "--output_dir", str(tmp_path / "awq"), "--device", "cpu"]), said.append
    )
    script, payload = toolchain.calls[0]
    assert (
        script == "gptq_awq.py"
        and payload["bits"] == 4
        and payload["group_size"] == 64
        and len({len(row) for row in payload["rows"]}) == 1
    )
    template = load_template(
        payload["model"] if Path(payload["model"]).exists() else folder,
        resolve("sft", partial=True).config.template,
    )
    every = [
        template.encode(
            [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}]
        ).input_ids
        for row in map(json.loads, chat_file.read_text().splitlines())
    ]
    calibrated, left = [], [token for row in payload["rows"] for token in row]
    while ids := next((list(ids) for ids in every if left[: len(ids)] == list(ids)), None):
        calibrated.append(ids)
        left = left[len(ids) :]
    assert len(calibrated) == 7 and not left  # less than one piece: all of it
    held_out = [list(ids) for ids in toolchain.calls[1][1]["probes"]]
    assert len(held_out) == 10 and not any(row in held_out for row in calibrated)
    assert any("training data of the run" in text for text in said)
    assert report.settings["calibration"].endswith("(training data of the run)") and report.passed
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [name.rpartition(".")[2] for name in stored["modules_to_not_convert"]] == [
        "v_proj",
        "v_proj",
        "lm_head",
    ]
    assert report.loads["transformers"].startswith("not tried: the model is quantised with awq")
    assert "vllm is not installed" in report.loads["vllm"]


def test_an_interrupted_export_goes_on(
    lora_run: Path, tmp_path: Path, stand_in: Callable[..., StandIn]
) -> None:
    words = [
        "--model",
        str(lora_run),
        "--quant_method",
        "gptq",
        "--output_dir",
        str(tmp_path / "g"),
        "--device",
        "cpu",
    ]
    said: list[str] = []
    for script in ("gptq_awq.py", "forward.py"):
        stand_in(fail_at=script)
        with pytest.raises(ToolchainError, match="killed"):
            export(resolve("export", words), said.append)
        assert not (tmp_path / "g").exists() and (tmp_path / ".g.export" / "merged").is_dir()
        assert said[-1].endswith("the same command goes on from there")
    toolchain = stand_in()
    _, report = export(resolve("export", words), said.append)
    assert [name for name, _ in toolchain.calls] == ["forward.py"] and report.passed
    assert "merged    before the interruption" in said and "quantised before the interruption" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["g"]


def test_other_options_start_anew(lora_run: Path, tmp_path: Path, stand_in: Callable[..., StandIn]) -> None:
    words = [
        "--model",
        str(lora_run),
        "--quant_method",
        "gptq",
        "--output_dir",
        str(tmp_path / "g"),
        "--device",
        "cpu",
    ]
    stand_in(fail_at="gptq_awq.py")
    with pytest.raises(ToolchainError):
        export(resolve("export", words), quiet)
    said: list[str] = []
    toolchain = stand_in()
    export(resolve("export", [*words, "--quant_n_samples", "3"]), said.append)
    assert any("starting anew" in text for text in said) and len(toolchain.calls[0][1]["rows"]) == 3


def test_without_data_it_calibrates_on_text_that_it_is_not_compared_on(
    tiny_model_dir: Path, tmp_path: Path, stand_in: Callable[..., StandIn]
) -> None:
    toolchain, said = stand_in(), []
    words = ["--model", str(tiny_model_dir), "--quant_method", "gptq", "--output_dir", str(tmp_path / "g")]
    _, report = export(resolve("export", [*words, "--quant_n_samples", "20", "--device", "cpu"]), said.append)
    rows, probes = toolchain.calls[0][1]["rows"], toolchain.calls[1][1]["probes"]
    assert len(rows) == 20 and not any(probe in rows for probe in probes)
    assert "documentation of Python's standard library" in report.settings["calibration"]
    assert any("rows like those the model will see are better: --dataset" in line for line in said)
