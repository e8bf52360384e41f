from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import WEIGHTS, FakeHub


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    hub = FakeHub(
        {
            "config.json": b'{"model_type": "tiny"}',
            "tokenizer.json": b"{}",
            "model-00001-of-00002.safetensors": WEIGHTS,
            "model-00002-of-00002.safetensors": WEIGHTS[::-1],
            "pytorch_model.bin": b"the same weights as a pickle",
            "original/consolidated.pth": b"and again",
        }
    )
    yield hub
    hub.close()


@pytest.fixture(params=["huggingface", "modelscope"])
def hub_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def environment(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both hubs' clients see the fake hub and an empty cache; returns the folder of the caches."""
    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "USE_HF",
        "HF_HUB_CACHE",
        "MODELSCOPE_DOMAIN",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    # The library reads this when it is imported, and tests/conftest.py switches it on.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
    return tmp_path
