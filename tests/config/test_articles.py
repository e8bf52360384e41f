"""The commands of the three articles, as printed: they plan, and every value they resolve to is pinned.

The golden file says what each command resolves to. After a change that is meant (a new option, another default):
``python tests/config/test_articles.py`` writes it again; look at the difference before committing it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift.cli.fit import command_meant
from swift.config.bind import dump, resolve

GOLDEN = Path(__file__).parent / "data" / "articles.json"
COMMANDS = {
    "1": "sft --model_type qwen3-7b-chat --dataset alpaca-en --lora_rank 64 --output_dir ./output-qwen3-lora "
    "--num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 16",
    "2": "sft PARALLEL.yaml --model m --dataset d --use_megatron=True",
    "3": "sft --model_type qwen3-7b --dataset long-alpaca --max_length 32768 --use_ring_attention True",
    "4": "sft --model_type qwen3-7b --dataset instruct-en --lora_rank 64 --lora_alpha 32 --quantization_bit 4 "
    "--use_lora True --output_dir ./output-qwen3-qlora",
    "5": "sft --model_type llama-7b --parallel_method megatron --tensor_parallel_size 4 --pipeline_parallel_size 2 "
    "--deepspeed zero3",
    "6": "sft --model_type qwen-vl-chat --dataset coco_vqa_zh --max_length 2048 --use_loss_scale --batch_size 16",
    "7": "sft --model_type llama3-70b --dataset finance_qa_zh --parallel_method megatron --tensor_parallel_size 8 "
    "--deepspeed deepspeed_zero3_config.json --output_dir ./output/llama3-finance",
    "8": "export --model_type llama3-70b --quant_method gptq --output_format vllm",
    "9": "fit --model_type qwen3-7b --dataset my_rlhf_data --parallel_strategy megatron --tp_size 4 --pp_size 2 "
    "--cp_size 1 --fsdp_num_shards 8 --use_liger_kernel true --max_length 8192",
    "10": "export --model_dir ./output/qwen3-7b-sft --quant_method awq --quant_bits 4 "
    "--dataset calibration_dataset --output_dir ./awq_models/qwen3-7b-awq",
}
PARALLEL = """
parallel:
  tensor_parallel_size: 4
  pipeline_parallel_size: 2
  sequence_parallel: true
  context_parallel_size: 2
"""
PYTHON = {
    "model_type": "qwen3-omni-7b",
    "train_type": "dpo",
    "dataset": "mm_preference_dataset.jsonl",
    "modality": ["text", "image"],
    "packing": True,
    "freeze_vision_encoder": True,
    "freeze_aligner": False,
    "max_images": 5,
    "max_length": 4096,
}
"""002's ``SwiftTrainer(config)``."""


@pytest.fixture
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC_PER_NODE", "NNODES", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield


def planned(name: str) -> dict[str, Any]:
    """What a command of the list (or the Python of 002) resolves to in a plan, and what is said about it."""
    if name == "python":
        command, words, values = "rlhf", [], PYTHON
    else:
        Path("PARALLEL.yaml").write_text(PARALLEL, encoding="utf-8")
        first, *rest = shlex.split(COMMANDS[name])
        (command, words), values = command_meant(first, rest), None
    resolved = resolve(command, words, values=values, planning=True)
    return {**dump(resolved), "warnings": resolved.warnings}


@pytest.mark.usefixtures("_empty_folder")
@pytest.mark.parametrize("name", [*COMMANDS, "python"])
def test_a_command_resolves_to_the_golden_values(name: str) -> None:
    assert planned(name) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


@pytest.mark.usefixtures("_empty_folder")
def test_the_values_the_articles_name_arrive() -> None:
    """Against the articles themselves, not the golden file: a wrong value must not be pinned."""
    first = planned("1")
    assert (first["tuner"]["lora_rank"], first["model"]["model"]) == (64, "qwen3-7b-chat")
    training = first["training"]
    assert (training["num_train_epochs"], training["per_device_train_batch_size"]) == (3, 2)
    assert training["gradient_accumulation_steps"] == 16
    parallel = planned("2")["parallel"]
    assert [parallel[f"{name}_parallel_size"] for name in ("tensor", "pipeline", "context")] == [4, 2, 2]
    assert parallel["sequence_parallel"] is True
    assert planned("3")["data"]["max_length"] == 32768
    sixth = planned("6")
    assert sixth["template"]["use_loss_scale"] is True
    assert sixth["training"]["per_device_train_batch_size"] == 16
    ninth = planned("9")
    assert ninth["command"] == "sft"
    assert ninth["training"]["use_liger_kernel"] is True
    assert any("FSDP 8, 64 processes" in warning for warning in ninth["warnings"])
    assert planned("10")["checkpoint"]["output_dir"] == "./awq_models/qwen3-7b-awq"


def write_golden() -> None:
    """Write the golden file from what the commands resolve to now."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = {name: planned(name) for name in (*COMMANDS, "python")}
    GOLDEN.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
