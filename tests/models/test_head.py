"""Backbone and output matrix: only where their product is the model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swift.models.head import split_head
from swift.models.load import load_model
from swift.models.tiny import make_tiny_model


def load(folder: Path, architecture: str, **config: Any) -> Any:
    return load_model(
        make_tiny_model(folder / "m", architecture=architecture, config=config), dtype=torch.float32
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2", "qwen3_moe"])
def test_the_product_is_the_logits(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = load(tmp_path, architecture, tie_word_embeddings=tied)
    model.train()
    split = split_head(model)
    assert split is not None and model.training
    backbone, head = split
    ids = torch.arange(30)[None] + 5
    model.eval()
    torch.testing.assert_close(head(backbone(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)
    assert (head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("gemma2", {}), ("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})],
)
def test_models_that_change_the_logits_give_none(tmp_path: Path, architecture: str, config: Any) -> None:
    assert split_head(load(tmp_path, architecture, **config)) is None


def test_a_model_without_head_gives_none() -> None:
    assert split_head(torch.nn.Linear(2, 2)) is None
