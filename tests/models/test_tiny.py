"""Models made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.core.errors import UsageError
from swift.models.facts import ModelFacts
from swift.models.load import load_tokenizer
from swift.models.tiny import make_tiny_model


def test_same_arguments_same_files(tmp_path: Path) -> None:
    import torch

    before = torch.get_rng_state()
    one, two = make_tiny_model(tmp_path / "one"), make_tiny_model(tmp_path / "two")
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name in sorted(file.name for file in one.iterdir()):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_sizes(tmp_path: Path) -> None:
    folder = make_tiny_model(
        tmp_path / "m", vocab_size=700, hidden_size=32, num_layers=3, texts=["ab cd " * 9]
    )
    facts = ModelFacts.read(folder)
    assert (facts.vocab_size, facts.hidden_size, facts.num_layers, facts.num_attention_heads) == (
        700,
        32,
        3,
        2,
    )
    assert len(load_tokenizer(folder)) <= 700


def test_every_byte_can_be_encoded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tiny_model(tmp_path / "m", texts=["plain"]))
    text = "né 🎉 \x00 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'qwen3'"):
        make_tiny_model(tmp_path / "m", architecture="qwen33")
