"""``/v1/embeddings``, ``/v1/score`` and ``/v1/rerank``: models that read texts and write none."""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from swift.core.errors import SwiftError
from swift.inference.server.completions import check_tokens
from swift.inference.server.errors import ApiError, check_unicode, from_swift_error
from swift.inference.server.http import unless_gone
from swift.inference.server.schemas import EmbeddingRequest, RerankRequest, ScoreRequest
from swift.inference.server.service import ServedModel, Service

__all__ = ["pooling_routes"]


def pooling_routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    routes = APIRouter(tags=["vectors and scores"])

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
        """A vector for each text, of length 1."""
        model = service.model(body.model)
        if model.task != "embedding":
            raise ApiError(400, f"{model.name} makes no embeddings (its task: {model.task})", param="model")
        prompts = _inputs(service, model, body)
        vectors = await unless_gone(request, service, _pool(service, model, prompts))
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _written(vector, body),
            }
            for index, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": model.name, "usage": _usage(prompts)}

    @routes.post("/v1/score")
    async def score(request: Request, body: ScoreRequest) -> dict[str, Any]:
        """How well the texts of each pair go together."""
        model = service.model(body.model)
        first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise ApiError(400, f"{len(first)} texts cannot be paired with {len(second)}", param="text_1")
        scores, tokens = await unless_gone(request, service, _scores(service, model, first, second))
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    @routes.post("/v1/rerank")
    async def rerank(request: Request, body: RerankRequest) -> dict[str, Any]:
        """The documents by their score for the query, best first."""
        model = service.model(body.model)
        queries = [body.query] * len(body.documents)
        scores, tokens = await unless_gone(request, service, _scores(service, model, queries, body.documents))
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": scores[index]} for index in order
        ]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.documents[result["index"]]}
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": model.name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes


def _inputs(service: Service, model: ServedModel, body: EmbeddingRequest) -> list[list[int]]:
    given: Any = body.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [
        _encode(model, [{"role": "user", "content": one}])
        if isinstance(one, str)
        else check_tokens(service, one)
        for one in given
    ]


def _encode(model: ServedModel, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids as in training. Raises ApiError for a text without tokens, or one that the template refuses."""
    check_unicode(*(message["content"] for message in messages))
    try:
        ids = model.template.encode_sequence(messages, end_token=model.task == "embedding")
    except SwiftError as error:
        raise from_swift_error(error) from error
    if not ids:
        raise ApiError(400, "a text has no tokens", param="input")
    return ids


async def _pool(service: Service, model: ServedModel, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    longest = max(map(len, prompts))
    limits = [service.engine.max_model_len, service.limits.prompt_tokens or service.engine.max_model_len]
    if longest > min(limits):
        raise ApiError(
            400, f"a text has {longest} tokens; {min(limits)} at most", code="context_length_exceeded"
        )
    if len(prompts) > service.limits.texts:
        raise ApiError(400, f"{len(prompts)} texts at once; {service.limits.texts} at most")
    started = time.monotonic()
    try:
        async with asyncio.timeout(service.limits.request_seconds):
            found = await service.engine.pool(prompts, adapter=model.adapter)
    except TimeoutError:
        service.metrics.timeouts += 1
        seconds = service.limits.request_seconds
        raise ApiError(504, f"not done within {seconds:g} s: reading {len(prompts)} texts") from None
    except SwiftError as error:
        raise from_swift_error(error) from error
    service.metrics.prompt_tokens += sum(map(len, prompts))
    service.metrics.first_token.observe(time.monotonic() - started)
    return found


async def _scores(
    service: Service, model: ServedModel, first: Sequence[str], second: Sequence[str]
) -> tuple[list[float], int]:
    """(scores between 0 and 1 of rankers, or cosines of embeddings; number of tokens)."""
    from swift.data.formats import Sample
    from swift.data.groups import read_texts

    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    if model.task == "embedding":
        texts = list(dict.fromkeys([*first, *second]))
        prompts = [_encode(model, said(text)) for text in texts]
        vectors = dict(zip(texts, await _pool(service, model, prompts), strict=True))
        return [_cosine(vectors[one], vectors[two]) for one, two in zip(first, second, strict=True)], sum(
            map(len, prompts)
        )
    if model.task not in ("reranker", "generative_reranker", "seq_cls"):
        raise ApiError(400, f"{model.name} gives no scores (its task: {model.task})", param="model")
    pairs = [Sample(said(one), extra={"positive": [two]}) for one, two in zip(first, second, strict=True)]
    task = "reranker" if model.task == "seq_cls" else model.task
    prompts = [_encode(model, read_texts(pair, task)[0]) for pair in pairs]
    logits = await _pool(service, model, prompts)
    if any(len(row) != 1 for row in logits):
        raise ApiError(400, f"{model.name} gives {len(logits[0])} numbers for a pair, not one", param="model")
    return [_sigmoid(row[0]) for row in logits], sum(map(len, prompts))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _cosine(one: Sequence[float], two: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, two, strict=True))
    return product / (math.hypot(*one) * math.hypot(*two) or 1.0)


def _cut(vector: Sequence[float], size: int | None) -> Sequence[float]:
    """The beginning of a vector, scaled to length 1 again (Matryoshka embeddings, arXiv 2205.13147)."""
    if size is None:
        return vector
    if size > len(vector):
        raise ApiError(400, f"dimensions {size}: the vectors have {len(vector)}", param="dimensions")
    length = math.hypot(*vector[:size]) or 1.0
    return [value / length for value in vector[:size]]


def _written(vector: Sequence[float], body: EmbeddingRequest) -> list[float] | str:
    vector = _cut(vector, body.dimensions)
    if body.encoding_format == "float":
        return list(vector)
    return base64.b64encode(array("f", vector).tobytes()).decode()


def _usage(prompts: Sequence[Sequence[int]]) -> dict[str, int]:
    tokens = sum(map(len, prompts))
    return {"prompt_tokens": tokens, "total_tokens": tokens}
