"""Facts without torch, and folders that are found wanting before anything slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift.core.errors import ModelError
from swift.models.facts import ModelFacts, check_model_folder, read_safetensors_header, resolve_model_path
from swift.models.tiny import make_tiny_model


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


ARCHITECTURES = (
    "cohere deepseek_v3 gemma gemma2 glm gpt2 granite llama mistral mixtral phi3 qwen2 qwen3 qwen3_moe"
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES.split())
def test_counted_and_computed_agree_with_the_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    import torch

    from swift.models.load import load_model

    folder = make_tiny_model(
        tmp_path / "m", architecture=architecture, num_layers=3, config={"tie_word_embeddings": tied}
    )
    model = load_model(folder, dtype=torch.float32)
    counted = ModelFacts.read(folder)
    (folder / "model.safetensors").unlink()
    computed = ModelFacts.read(folder)
    assert counted.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (counted.exact, computed.exact) == (True, False)
    assert computed.parts == counted.parts and computed.weights_bytes is None
    assert (counted.parts["head"] == 0) == tied
    assert counted.architecture == type(model).__name__


# Sizes of well-known models and the totals known for them (recalled, not read from their files here).
PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    (
        "Qwen3-0.6B",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    (
        "Qwen2.5-7B",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    (
        "Llama-3-8B",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    (
        "Qwen3-30B-A3B",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
]


@pytest.mark.parametrize(("name", "config", "total"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_models(tmp_path: Path, name: str, config: dict[str, Any], total: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = ModelFacts.read(tmp_path)
    assert facts.num_parameters == total
    if facts.is_mixture_of_experts:
        assert facts.num_active_parameters == pytest.approx(3.35e9, rel=0.01)
    else:
        assert facts.num_active_parameters == total


def test_sizes_of_a_vision_language_model_are_its_text_models(tmp_path: Path) -> None:
    text = PUBLISHED[1][1]
    config = {
        "architectures": ["SomeVLForConditionalGeneration"],
        "model_type": "some_vl",
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = ModelFacts.read(tmp_path)
    assert (facts.architecture, facts.num_layers, facts.head_dim) == (
        "SomeVLForConditionalGeneration",
        28,
        128,
    )


def test_no_heavy_import(tiny_model_dir: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom swift.models.facts import ModelFacts\n"
        f"ModelFacts.read(Path({str(tiny_model_dir)!r}))\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_whole_folder_passes(tiny_model_dir: Path) -> None:
    check_model_folder(tiny_model_dir)
    assert resolve_model_path(str(tiny_model_dir)) == tiny_model_dir


def refuse(folder: Path, message: str) -> ModelError:
    with pytest.raises(ModelError, match=message) as error:
        check_model_folder(folder)
    assert error.value.where and str(folder) in error.value.where
    return error.value


def test_missing_files(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "x")
    assert "tokenizer.json" in (refuse(folder, "no tokenizer").fix or "")
    (folder / "x").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights")
    check_model_folder(folder, need_weights=False)
    (folder / "config.json").unlink()
    refuse(folder, "no config.json")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert refuse(folder, "no config.json").fix == f"--adapters {folder}"


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    assert " of " in (refuse(folder, "truncated").why or "")
    for kept in (0, 5, 100):
        weights.write_bytes(content[:kept])
        refuse(folder, "not a complete safetensors file")


def test_missing_shards(folder: Path) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert not ModelFacts.read(folder).exact
    error = refuse(folder, "2 of 3 weight files are missing")
    assert error.why == f"{names[1]}, {names[2]}"


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ', encoding="utf-8")
    refuse(folder, "not valid JSON")
    (folder / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(ModelError, match="does not say hidden_size"):
        ModelFacts.read(folder)


def test_header_size(tiny_model_dir: Path) -> None:
    header, size = read_safetensors_header(tiny_model_dir / "model.safetensors")
    assert header["model.embed_tokens.weight"]["shape"] == [512, 64]
    assert size == (tiny_model_dir / "model.safetensors").stat().st_size


def test_resolve_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelError, match="no model folder") as error:
        resolve_model_path(str(folder.parent / "modle"))
    assert error.value.fix == f"--model {folder}"
    with pytest.raises(ModelError, match="not a file"):
        resolve_model_path(str(folder / "config.json"))
