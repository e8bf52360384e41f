"""Loading: the same objects as the Auto classes give, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swift.config.sections.template import TemplateSection
from swift.core.errors import ModelError
from swift.models.load import load_bundle, load_model, load_tokenizer
from swift.models.tiny import make_tiny_model


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(values)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def test_bundle(tiny_model_dir: Path) -> None:
    bundle = load_bundle(tiny_model_dir, TemplateSection(), dtype=torch.float32, device="cpu")
    assert type(bundle.model).__name__ == "Qwen3ForCausalLM" and bundle.attention == "swift_varlen"
    assert not bundle.model.training and bundle.model.config.use_cache is False
    assert bundle.facts.num_parameters == sum(p.numel() for p in bundle.model.parameters())
    assert bundle.tokenizer.decode(bundle.template.stop_token_ids) == "<|im_end|>"


def test_same_weights_as_auto_model(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = load_model(tiny_model_dir, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    assert type(ours) is type(theirs)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral"])
def test_same_ids_as_auto_tokenizer(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    folder = make_tiny_model(tmp_path / "m", chat_template=template)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello there", " né 👩‍👩‍👧\n\n", "<s>[INST] <|im_start|>", ""):
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(
                text, add_special_tokens=special
            )
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.chat_template == theirs.chat_template


def test_the_tokenizer_comes_without_torch(tiny_model_dir: Path) -> None:
    code = (
        "import sys\nfrom swift.config.sections.template import TemplateSection\n"
        "from swift.models.load import load_template\n"
        f"template = load_template({str(tiny_model_dir)!r}, TemplateSection())\n"
        "assert template.encode([{'role': 'user', 'content': 'x'}]).input_ids\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_padding_token_is_found(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(folder).pad_token == "<|endoftext|>"


def test_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", architectures=["Qwen33ForCausalLM"])
    with pytest.raises(ModelError, match="does not know the architecture") as error:
        load_model(folder, dtype=torch.float32)
    assert "Qwen3ForCausalLM" in (error.value.why or "") and "pip install -U" in (error.value.fix or "")


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    edit(folder / "config.json", architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "my.MyModel"})
    with pytest.raises(ModelError, match="Python code of its own") as error:
        load_model(folder, dtype=torch.float32)
    assert error.value.fix == "--trust_remote_code true"


def test_weights_of_another_model(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ModelError, match="11 weights of Qwen3ForCausalLM are not in the folder") as error:
        load_model(folder, dtype=torch.float32)
    assert "model.layers.2.input_layernorm.weight" in (error.value.why or "")
    edit(folder / "config.json", num_hidden_layers=2, intermediate_size=100)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(folder, dtype=torch.float32)


def test_unknown_model_type(folder: Path) -> None:
    edit(folder / "config.json", architectures=None, model_type="qwen33")
    with pytest.raises(ModelError, match="unknown model type 'qwen33'"):
        load_model(folder, dtype=torch.float32)


def test_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(600)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="has only 512 rows"):
        load_bundle(folder, TemplateSection(), dtype=torch.float32, device="cpu")


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3', encoding="utf-8")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder)


def test_attention_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    gemma2 = make_tiny_model(tmp_path / "m", architecture="gemma2")
    with pytest.raises(ModelError, match="not exact for gemma2"):
        load_model(gemma2, dtype=torch.float32, attention="varlen")
