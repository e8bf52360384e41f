"""Fixtures for every test: one thread, a tiny model."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

_TEXTS = [
    "Reverse the letters: a b c d e. The answer is e d c b a.",
    "What is the capital of France? The capital of France is Paris.",
    "Hello! How are you today? I am fine, thank you.",
    "Once upon a time there was a small model that learned to add numbers: 1 + 2 = 3.",
    "You are a helpful assistant. Answer the question in one word.",
]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with about 100,000 random weights, 512 tokens and a chat template with ``{% generation %}``.

    Tests share it: read it, never write into it.
    """
    import torch

    from swift.models.tiny import make_tiny_model

    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", texts=_TEXTS)
