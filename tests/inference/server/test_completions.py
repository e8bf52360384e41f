"""Completions, vectors, scores, models and tokens, through the real OpenAI client where it has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted import ScriptedEngine

from swift.inference.server.service import Service

TEXT = "The answer is 42, no doubt."


def test_texts_and_token_ids(client: openai.OpenAI, engine: ScriptedEngine, service: Service) -> None:
    ids = service.tokenizer.encode("Once upon")
    for prompt in ("Once upon", ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=50)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert [list(request.prompt) for request in engine.requests] == [ids, ids]
    client.completions.create(model="tiny", prompt="Once upon")
    assert engine.requests[-1].sampling.max_tokens == 16  # as OpenAI's


def test_lists_of_prompts_times_n(client: openai.OpenAI, engine: ScriptedEngine, service: Service) -> None:
    engine.script = lambda request: f"{len(request.prompt)} {request.sampling.seed}"
    prompts: Any = [[5], [5, 6]]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, seed=7)
    assert [choice.text for choice in answer.choices] == ["1 7", "1 8", "2 7", "2 8"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage and answer.usage.prompt_tokens == 3
    texts = [""] * 4
    for part in client.completions.create(model="tiny", prompt=["a", "b c"], n=2, seed=7, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.text
    lengths = [len(service.tokenizer.encode(text)) for text in ("a", "b c")]
    assert texts == [f"{length} {seed}" for length in lengths for seed in (7, 8)]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_with_the_prompt_in_front(
    client: openai.OpenAI, service: Service, stream: bool
) -> None:
    """What evaluation programs read: echo and logprobs together."""
    options: Any = {"model": "tiny", "prompt": "How are you", "max_tokens": 3, "logprobs": 1, "echo": True}
    if stream:
        parts = list(client.completions.create(**options, stream=True))
        text = "".join(part.choices[0].text for part in parts)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        told = {name: [] for name in names}
        for part in parts:
            for name in names:
                told[name] += getattr(part.choices[0].logprobs, name)
    else:
        choice = client.completions.create(**options).choices[0]
        text, told = choice.text, choice.logprobs.model_dump()
    ids = service.tokenizer.encode("How are you") + service.tokenizer.encode(TEXT)[:3]
    assert text == "How are youThe answer is"
    assert told["token_logprobs"] == [None, *(-token / 1000 for token in ids[1:])]
    assert "".join(told["tokens"]) == text
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token
    assert told["top_logprobs"][0] is None and len(told["top_logprobs"][1]) == 1


def test_no_answer_at_all(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """max_tokens 0 asks for the prompt's log-probabilities alone."""
    answer = client.completions.create(model="tiny", prompt="How are", max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == "How are" and answer.usage and answer.usage.completion_tokens == 0
    assert choice.logprobs and len(choice.logprobs.tokens or []) == answer.usage.prompt_tokens
    assert engine.requests[0].sampling.max_tokens == 1


def test_models_and_adapters(client: openai.OpenAI, url: str, engine: ScriptedEngine, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "french", "ranker", "vectors"]
    assert client.models.retrieve("french").model_dump()["parent"] == "tiny"
    folder = {"lora_name": "new", "lora_path": str(tmp_path)}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=folder).json()["status"] == "loaded"
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=folder).status_code == 400  # taken
    client.chat.completions.create(model="new", messages=[{"role": "user", "content": "x"}])
    assert engine.requests[0].adapter == "new" and engine.folders == {"new": tmp_path}
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("new")
    missing = {"lora_name": "other", "lora_path": str(tmp_path / "missing")}
    answer = httpx.post(f"{url}/v1/load_lora_adapter", json=missing)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["message"] == f"{tmp_path / 'missing'}: no such folder"
    assert error["param"] == "lora_path"
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "tiny"}).status_code == 400


def test_adapters_stay_where_the_server_says_so(url: str, service: Service, tmp_path: Path) -> None:
    service.read_adapter = None
    body = {"lora_name": "new", "lora_path": str(tmp_path)}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body).status_code == 403
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "french"}).status_code == 403


def test_tokens_there_and_back(url: str, service: Service) -> None:
    text = "Grüße 🙂 <|im_end|>"
    found = httpx.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == service.tokenizer.encode(text)
    assert found["count"] == len(found["token_strs"]) and found["max_model_len"] == 512
    assert httpx.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "x"}]
    found = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()
    assert found["tokens"] == service.models["tiny"].template.encode_prompt(messages)
    assert httpx.post(f"{url}/tokenize", json={}).status_code == 400


def test_vectors(client: openai.OpenAI, engine: ScriptedEngine, monkeypatch: Any) -> None:
    async def pool(prompts: Any, *, adapter: str | None = None) -> list[list[float]]:
        return [[0.6, 0.0, 0.8] for _ in prompts]

    monkeypatch.setattr(engine, "pool", pool)
    found = client.embeddings.create(model="vectors", input=["a", "b"])  # the client asks for base64
    assert [entry.index for entry in found.data] == [0, 1]
    assert found.data[0].embedding == pytest.approx([0.6, 0.0, 0.8], abs=1e-7)
    cut = client.embeddings.create(model="vectors", input="a", dimensions=2, encoding_format="float")
    assert cut.data[0].embedding == [1.0, 0.0]
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="vectors", input="a", dimensions=4)
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="a")


def test_scores_and_ranks(url: str, engine: ScriptedEngine, service: Service, monkeypatch: Any) -> None:
    asked: list[Any] = []

    async def pool(prompts: Any, *, adapter: str | None = None) -> list[list[float]]:
        asked.extend(prompts)
        return [[float(number) - 1] for number in range(len(prompts))]

    monkeypatch.setattr(engine, "pool", pool)
    body = {"model": "ranker", "text_1": "tall?", "text_2": ["red", "300 m", "no"]}
    found = httpx.post(f"{url}/v1/score", json=body).json()
    expected = [1 / (1 + math.exp(-value)) for value in (-1.0, 0.0, 1.0)]
    assert [entry["score"] for entry in found["data"]] == pytest.approx(expected)
    # The conversation that a ranker is trained on: the document answers the query.
    template = service.models["ranker"].template
    messages = [{"role": "user", "content": "tall?"}, {"role": "assistant", "content": "red"}]
    assert asked[0] == template.encode_sequence(messages)
    body = {"model": "ranker", "query": "tall?", "documents": ["red", "300 m", "no"], "top_n": 2}
    found = httpx.post(f"{url}/v1/rerank", json=body).json()
    assert [entry["index"] for entry in found["results"]] == [2, 1]
    assert found["results"][0]["document"] == {"text": "no"}
    pairs = {"model": "ranker", "text_1": ["a", "b"], "text_2": ["c", "d", "e"]}
    assert httpx.post(f"{url}/v1/score", json=pairs).status_code == 400
    assert httpx.post(f"{url}/v1/score", json={**pairs, "model": "tiny", "text_1": "a"}).status_code == 400


def test_scores_of_vectors_are_cosines(url: str, engine: ScriptedEngine, monkeypatch: Any) -> None:
    async def pool(prompts: Any, *, adapter: str | None = None) -> list[list[float]]:
        return [[3.0, 4.0], [4.0, 3.0]][: len(prompts)]

    monkeypatch.setattr(engine, "pool", pool)
    body = {"model": "vectors", "text_1": "a", "text_2": ["b", "a"]}
    found = httpx.post(f"{url}/v1/score", json=body).json()
    assert [entry["score"] for entry in found["data"]] == pytest.approx([0.96, 1.0])
