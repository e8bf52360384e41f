"""A server with a scripted engine, and the real OpenAI client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from scripted import ScriptedEngine, running

from swift.config.sections.template import TemplateSection
from swift.inference.server.service import ServedModel, Service
from swift.models.load import load_template
from swift.models.template import Template


@pytest.fixture(scope="session")
def template(tiny_model_dir: Path) -> Template:
    return load_template(tiny_model_dir, TemplateSection())


@pytest.fixture
def engine(template: Template) -> ScriptedEngine:
    return ScriptedEngine(template.tokenizer, lambda request: "The answer is 42, no doubt.")


@pytest.fixture
def service(engine: ScriptedEngine, template: Template, tiny_model_dir: Path) -> Service:
    def read_adapter(name: str, folder: Path) -> ServedModel:
        return ServedModel(name, template, folder, adapter=name, parent="tiny")

    models = {
        "tiny": ServedModel("tiny", template, tiny_model_dir),
        "french": ServedModel("french", template, tiny_model_dir, adapter="french", parent="tiny"),
        "ranker": ServedModel("ranker", template, tiny_model_dir, task="reranker"),
        "vectors": ServedModel("vectors", template, tiny_model_dir, task="embedding"),
    }
    return Service(engine, models, vocab_size=512, read_adapter=read_adapter)


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
