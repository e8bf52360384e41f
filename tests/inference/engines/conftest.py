"""Tiny models that write lively text, and what their plain forward says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_models import lively

from swift.config.sections.template import TemplateSection
from swift.models.load import ModelBundle, load_bundle
from swift.models.tiny import make_tiny_model

TEXTS = ["Reverse the letters: a b c d e. The answer is e d c b a.", "1 + 2 = 3", "Hello, how are you?"]


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelBundle]:
    made: dict[str, Path] = {}

    def make(architecture: str = "qwen3", **options: object) -> ModelBundle:
        key = repr((architecture, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("engine-models") / architecture
            made[key] = make_tiny_model(folder, texts=TEXTS, architecture=architecture, **options)  # type: ignore[arg-type]
        return load_bundle(made[key], TemplateSection(), dtype=torch.float32, device="cpu")

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., ModelBundle]) -> ModelBundle:
    return lively(make_bundle())
