"""Merged models: the numbers, the folder, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from tuner_models import shake, tiny_gpt2, tiny_qwen3, tokens

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ModelError
from swift.models.compare import LogitsDifference, Probe, compare
from swift.models.load import load_tokenizer
from swift.tuners.apply import apply_tuner, tuned_model
from swift.tuners.merge import merge_adapter, merge_limit, merge_to_folder


def difference_of(found: torch.Tensor, expected: torch.Tensor) -> LogitsDifference:
    probes = [Probe.text([0] * found.shape[1])] * len(found)
    return compare(expected.detach(), found.detach(), probes)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gpt2])
def test_merged_weights_compute_what_the_adapter_computes(make) -> None:
    model = make()
    names = [name for name, _ in model.named_modules()]
    saved = [] if make is tiny_gpt2 else ["lm_head"]
    tuned = apply_tuner(model, TunerSection(modules_to_save=saved, use_rslora=True))
    shake(tuned.named_trainable())
    expected = model(tokens()).logits
    merge_adapter(model)
    assert [name for name, _ in model.named_modules()] == names
    difference = difference_of(model(tokens()).logits, expected)
    assert difference.max < 1e-5 and difference.same_choice == 1.0 and difference.kl < 1e-9
    assert difference.relative < merge_limit(torch.float32)
    assert tuned_model(model).kind == "full"


def test_bfloat16_sums_in_float32_and_rounds_once() -> None:
    model = tiny_qwen3().to(torch.bfloat16)
    tuned = apply_tuner(model, TunerSection(target_modules=["q_proj"]))
    shake(tuned.named_trainable(), std=0.01)
    layer = model.model.layers[0].self_attn.q_proj
    exact = layer.weight.float() + layer.delta("default")
    merge_adapter(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))


def test_the_folder_is_a_plain_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tuned = apply_tuner(model, TunerSection())
    shake(tuned.named_trainable())
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = model.eval()(ids).logits
    model.config.use_cache = False
    difference = merge_to_folder(model, load_tokenizer(tiny_model_dir), tmp_path / "merged")
    assert difference.max < 1e-4 and difference.relative < 1e-5
    assert f"{difference.max:.1e}" in str(difference)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(stored(ids).logits, expected, atol=1e-4, rtol=1e-4)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("use_cache", True) is True
    assert load_tokenizer(tmp_path / "merged").chat_template == load_tokenizer(tiny_model_dir).chat_template


def test_a_wrong_result_leaves_no_folder(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A hook makes the model with the adapter answer something that its weights do not say."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    shake(apply_tuner(model, TunerSection()).named_trainable())
    handle = model.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", -output.logits)
    )
    with pytest.raises(ModelError, match="does not compute what the adapter computes") as caught:
        merge_to_folder(model, load_tokenizer(tiny_model_dir), tmp_path / "merged")
    handle.remove()
    assert "limit is 1e-03" in (caught.value.why or "")
    assert list(tmp_path.iterdir()) == []


def test_the_limits_tell_rounding_from_a_forgotten_adapter() -> None:
    base = tiny_qwen3()
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(base).to(dtype)
        tuned = apply_tuner(model, TunerSection())
        shake(tuned.named_trainable(), std=0.1)
        ids = torch.randint(0, 61, (2, 64), generator=torch.Generator().manual_seed(1))
        expected = model(ids).logits
        with tuned.adapter_disabled():
            forgotten = model(ids).logits
        merge_adapter(model)
        limit = merge_limit(dtype)
        assert difference_of(model(ids).logits, expected).relative <= limit
        assert not difference_of(forgotten, expected).relative <= limit
        assert not difference_of(forgotten * float("nan"), expected).relative <= limit


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    model = tiny_qwen3(tied=True)
    apply_tuner(model, TunerSection(target_modules=["lm_head"]))
    with pytest.raises(
        ModelError, match=r"lm_head cannot be merged: its weight is also that of model\.embed_tokens"
    ):
        merge_adapter(model)


def test_there_must_be_an_adapter() -> None:
    with pytest.raises(ModelError, match="no adapter 'default'"):
        merge_adapter(tiny_qwen3())
