"""Shifted sparse attention against a mask written out pair by pair; and what it must not change."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.resuming import train_and_resume
from tests.train.conftest import chat_file, run_training

from swift.cli.merge_lora import merge
from swift.config.bind import resolve
from swift.core.errors import ModelError
from swift.models.attention import SHIFTED_GROUPS, varlen_attention
from swift.models.load import load_model
from swift.models.tiny import make_tiny_model
from swift.runs.metrics import read_metrics
from swift.tuners.longlora import use_shifted_groups

__all__ = ["chat_file", "run_training"]  # fixtures


def sees(lengths: list[int], size: int, *, shifted: bool) -> torch.Tensor:
    """[width, width]: whether a token (row) sees another (column)."""
    places = [(document, place) for document, length in enumerate(lengths) for place in range(length)]

    def group(document: int, place: int) -> int:
        if lengths[document] <= size:
            return 0
        return (place + math.ceil(size / 2)) // size if shifted else place // size

    return torch.tensor(
        [[a[0] == b[0] and b[1] <= a[1] and group(*a) == group(*b) for b in places] for a in places]
    )


@pytest.mark.parametrize("size", [4, 6, 7, 100])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1), (3, 3), (6, 3)])
@pytest.mark.parametrize("lengths", [None, [[26], [26]], [[3, 9, 14], [20, 1, 5]]])
def test_against_a_mask_by_hand(size, heads, shared, lengths) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, number, 26, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for number in (heads, shared, shared)
    )
    module = SimpleNamespace(training=True, is_causal=True, **{SHIFTED_GROUPS: size})
    found, _ = varlen_attention(module, query, key, value, None, document_lengths=lengths)
    rows = []
    for row, documents in enumerate(lengths or [[26], [26]]):
        masks = [sees(documents, size, shifted=head >= math.ceil(heads / 2)) for head in range(heads)]
        k, v = (one[row].repeat_interleave(heads // shared, 0) for one in (key, value))
        scores = (query[row] @ k.transpose(1, 2) / 8**0.5).masked_fill(~torch.stack(masks), float("-inf"))
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    mine, other = (
        torch.autograd.grad((one * weights).sum(), (query, key, value)) for one in (found, expected)
    )
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_only_training_is_cut(tiny_model_dir) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float64)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        use_shifted_groups(model, 8)
        assert torch.equal(model(input_ids=ids).logits, whole)
        model.train()
        cut = model(input_ids=ids).logits
        assert torch.equal(cut[:, :4], whole[:, :4])  # no border lies before the fifth token
        assert (cut[:, 8:] - whole[:, 8:]).abs().max() > 1e-4
        ids[0, 20] += 1
        later = model(input_ids=ids).logits
        assert torch.equal(later[:, :20], cut[:, :20])  # nothing comes from later tokens
        assert (
            later[:, 24:] - cut[:, 24:]
        ).abs().max() > 1e-6  # and something from other groups, by two layers


def test_refused_for_another_attention(tiny_model_dir) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float32, attention="eager")
    with pytest.raises(ModelError, match="eager"):
        use_shifted_groups(model, 8)


@pytest.mark.parametrize("packing", [False, True])
def test_trains_with_embedding_and_norms_and_resumes(packing, run_training, tmp_path) -> None:
    base = make_tiny_model(tmp_path / "base", config={"tie_word_embeddings": False})
    options = {"model": str(base), "longlora_group_size": 8, "packing": packing, "learning_rate": 5e-3,
               "per_device_train_batch_size": 1 if packing else 4,
               "modules_to_save": ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]}  # fmt: skip
    whole = train_and_resume(run_training, tmp_path, **options)
    plain = run_training(run_name="plain", **{**options, "longlora_group_size": 0, "max_steps": 1}).folder
    first = [next(iter(read_metrics(folder / "metrics.jsonl")))["loss"] for folder in (plain, whole)]
    assert first[0] != first[1]

    from peft import PeftModel

    from swift.tuners.peft_format import load_adapter

    ids = torch.arange(3, 43)[None]
    ours, theirs = (load_model(base, dtype=torch.float32) for _ in range(2))
    load_adapter(ours, whole / "last")
    theirs = PeftModel.from_pretrained(theirs, whole / "last").eval()
    saved = json.loads((whole / "last" / "adapter_config.json").read_text())["modules_to_save"]
    assert len(saved) == 2 + 2 * 2
    with torch.no_grad():
        expected = ours.eval()(input_ids=ids).logits
        torch.testing.assert_close(expected, theirs(input_ids=ids).logits)
        words = ["--adapters", str(whole), "--output_dir", str(tmp_path / "merged"), "--device", "cpu"]
        merged = load_model(merge(resolve("merge-lora", words)), dtype=torch.float32)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
