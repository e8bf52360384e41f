"""Adapter folders both ways, with PEFT as the oracle."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tuner_models import shake, tiny_gpt2, tiny_qwen3, tokens

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ModelError
from swift.models.load import load_model
from swift.models.tiny import make_tiny_model
from swift.tuners.apply import apply_tuner
from swift.tuners.lora import lora_layers
from swift.tuners.merge import merge_adapter
from swift.tuners.peft_format import adapter_folder, load_adapter, save_adapter

SECTIONS = {
    "all-linear": {},
    "some": {"target_modules": ["q_proj", "0.mlp.up_proj"], "lora_rank": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True, "target_modules": ["v_proj"], "init_weights": "gaussian"},
    "saved": {"modules_to_save": ["lm_head", "model.norm"], "target_modules": ["o_proj"]},
}


@pytest.mark.parametrize("case", list(SECTIONS))
def test_peft_loads_ours_and_we_load_peft(case: str, tmp_path: Path) -> None:
    base = tiny_qwen3()
    tuned = apply_tuner(copy.deepcopy(base), TunerSection(**SECTIONS[case]))
    shake(tuned.named_trainable())
    expected = tuned.model(tokens()).logits
    save_adapter(tuned.model, tmp_path / "ours", "some/base")

    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(peft_model(tokens()).logits, expected, atol=2e-6, rtol=1e-5)
    assert peft_model.peft_config["default"].base_model_name_or_path == "some/base"

    peft_model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(again.model(tokens()).logits, expected)
    assert not again.named_trainable()
    assert (
        load_adapter(copy.deepcopy(base), tmp_path / "theirs", trainable=True).num_trainable
        == tuned.num_trainable
    )


def test_the_configuration_is_what_peft_would_write(tmp_path: Path) -> None:
    options = {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
    }
    theirs = get_peft_model(tiny_qwen3(), LoraConfig(task_type="CAUSAL_LM", **options))
    theirs.save_pretrained(tmp_path / "theirs")
    section = TunerSection(
        lora_rank=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "up_proj"]
    )
    save_adapter(apply_tuner(tiny_qwen3(), section).model, tmp_path / "ours")
    ours, peft = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    peft["target_modules"].sort()
    assert {key: peft[key] for key in ours} == ours
    left_out = {key: value for key, value in peft.items() if key not in ours}
    defaults = LoraConfig().to_dict()
    assert all(
        not value or key == "peft_version" or value == defaults[key] for key, value in left_out.items()
    )


def test_a_relative_base_folder_is_stored_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_adapter(apply_tuner(tiny_qwen3(), TunerSection()).model, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())


def test_gpt2_conv1d_both_ways(tmp_path: Path) -> None:
    base = tiny_gpt2()
    tuned = apply_tuner(copy.deepcopy(base), TunerSection())
    shake(tuned.named_trainable())
    expected = tuned.model(tokens()).logits
    save_adapter(tuned.model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path).model(tokens()).logits, expected)


@pytest.mark.parametrize("architecture", ["glm", "phi3", "gemma2", "mixtral"])
def test_other_architectures_both_ways_and_merged(architecture: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", architecture=architecture)
    base = load_model(tmp_path / "base", dtype=torch.float32)
    ids = tokens(2, 9)
    tuned = apply_tuner(copy.deepcopy(base), TunerSection())
    shake(tuned.named_trainable(), std=0.1)
    expected = tuned.model(input_ids=ids).logits
    assert (expected - base(input_ids=ids).logits).abs().max() > 1e-3
    save_adapter(tuned.model, tmp_path / "adapter", tmp_path / "base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    merge_adapter(tuned.model)
    torch.testing.assert_close(tuned.model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_experts_left_out_by_all_linear_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_model(tmp_path, architecture="qwen3_moe")
    tuned = apply_tuner(load_model(tmp_path, dtype=torch.float32), TunerSection())
    assert {name.rpartition(".")[2] for name in lora_layers(tuned.model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert "all-linear leaves out the experts" in caplog.text and "mlp.experts.gate_up_proj" in caplog.text


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    base = tiny_qwen3()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj", "down_proj"],
        rank_pattern={"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        alpha_pattern={"down_proj": 3},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    shake({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    expected = theirs(tokens()).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours.model(tokens()).logits, expected, atol=2e-6, rtol=1e-5)
    save_adapter(ours.model, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(tokens()).logits, expected, atol=2e-6, rtol=1e-5)


def test_loading_into_an_attached_adapter_keeps_its_parameters(tmp_path: Path) -> None:
    tuned = apply_tuner(tiny_qwen3(), TunerSection(modules_to_save=["lm_head"]))
    shake(tuned.named_trainable())
    save_adapter(tuned.model, tmp_path)
    stored = {name: p.detach().clone() for name, p in tuned.named_trainable().items()}
    fresh = apply_tuner(tiny_qwen3(), TunerSection(modules_to_save=["lm_head"]), seed=9)
    before = {name: id(p) for name, p in fresh.named_trainable().items()}
    load_adapter(fresh.model, tmp_path, trainable=True)
    assert {name: id(p) for name, p in fresh.named_trainable().items()} == before
    assert all(torch.equal(p, stored[name]) for name, p in fresh.named_trainable().items())
    other = apply_tuner(tiny_qwen3(), TunerSection(lora_rank=2))
    with pytest.raises(ModelError, match="set up with other modules, ranks or scales"):
        load_adapter(other.model, tmp_path, trainable=True)


def test_half_precision_adapters_are_trained_in_float32(tmp_path: Path) -> None:
    tuned = apply_tuner(tiny_qwen3(), TunerSection(lora_dtype="bfloat16"))
    save_adapter(tuned.model, tmp_path)
    for trainable, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model = load_adapter(tiny_qwen3(), tmp_path, trainable=trainable).model
        assert {layer.lora_A["default"].dtype for layer in lora_layers(model).values()} == {dtype}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_adapter(apply_tuner(tiny_qwen3(), TunerSection()).model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"bias": "all"}, 'bias="all"'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"peft_type": "XLORA"}, "type XLORA"),
    ],
)
def test_what_we_cannot_do_is_refused_by_name(stored: Path, change: dict[str, object], message: str) -> None:
    path = stored / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError) as caught:
        load_adapter(tiny_qwen3(), stored)
    assert message in caught.value.message and caught.value.where == str(path)


def test_an_adapter_of_another_base_names_the_module(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not fit") as caught:
        load_adapter(tiny_gpt2(), stored)
    assert "no linear layer model.layers.0.mlp.down_proj" in (caught.value.why or "")
    tensors = load_file(stored / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key] = torch.zeros(30, 8)
    save_file(tensors, stored / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit") as caught:
        load_adapter(tiny_qwen3(), stored)
    assert "model.layers.1.mlp.up_proj maps 16 to 24 features" in (caught.value.why or "")
    del tensors[key]
    save_file(tensors, stored / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks one of the two matrices"):
        load_adapter(tiny_qwen3(), stored)


def test_broken_folders_are_explained(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_qwen3(), tmp_path)
    weights = stored / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="broken adapter weights"):
        load_adapter(tiny_qwen3(), stored)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapter(tiny_qwen3(), stored)


def test_the_adapter_of_a_run_is_its_last_checkpoint(stored: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        shutil.copytree(stored, run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "state.json").write_text("{}")
    assert adapter_folder(run) == run / "checkpoint-10"
    (run / "last").symlink_to("checkpoint-2")
    assert adapter_folder(run) == run / "checkpoint-2"
    assert adapter_folder(run / "checkpoint-10") == run / "checkpoint-10"
    with pytest.raises(ModelError, match="no such folder"):
        adapter_folder(tmp_path / "nothing")
    (run / "checkpoint-2" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="trained the whole model"):
        adapter_folder(run)
