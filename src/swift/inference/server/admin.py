"""Routes beside the answers: models and adapters, tokens, health, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from swift.core.errors import SwiftError
from swift.inference.server.completions import check_tokens
from swift.inference.server.errors import ApiError, check_unicode, from_swift_error
from swift.inference.server.prompts import encode_text, messages_of, tools_of
from swift.inference.server.schemas import (
    AdapterName,
    AdapterPlace,
    DetokenizeRequest,
    TokenizeRequest,
)
from swift.inference.server.service import ServedModel, Service

__all__ = ["admin_routes"]


def admin_routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    routes = APIRouter()
    for some in (_server_routes(service), _model_routes(service), _token_routes(service)):
        routes.include_router(some)
    return routes


def _server_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["server"])

    @routes.get("/health")
    def health() -> Response:
        """200 when the server answers requests, 503 while it loads or goes down, or when its engine has ended; needs no
        key."""
        state: str = service.state
        if state == "ready" and not service.engine.is_alive:
            state = "failed"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """Prometheus' text format."""
        return service.metrics.text(service.engine.stats())

    return routes


def _model_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models")
    def models() -> dict[str, Any]:
        """The base model and the adapters on it."""
        return {"object": "list", "data": [_told(service, model) for model in service.models.values()]}

    @routes.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return _told(service, service.model(name))

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(body: AdapterPlace) -> dict[str, str]:
        """Make an adapter available under a name of its own."""
        if service.read_adapter is None:
            raise ApiError(
                403, "this server takes no adapters at run time (--runtime_adapters true allows it)"
            )
        if body.lora_name in service.models or body.lora_name in service.engine.adapters():
            raise ApiError(400, f"{body.lora_name} is the name of a model here already", param="lora_name")
        try:
            model = service.read_adapter(body.lora_name, Path(body.lora_path))
            await service.engine.load_adapter(body.lora_name, model.folder)
        except SwiftError as error:
            raise from_swift_error(error, "lora_path") from error
        except (OSError, ValueError) as error:  # a path that cannot be one
            raise ApiError(400, f"the adapter cannot be read: {error}", param="lora_path") from error
        service.models[body.lora_name] = model
        return {"status": "loaded", "model": body.lora_name}

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: AdapterName) -> dict[str, str]:
        """Take an adapter away; its running answers are completed first."""
        if service.read_adapter is None:
            raise ApiError(403, "this server's adapters stay (--runtime_adapters true allows changes)")
        model = service.model(body.lora_name)
        if model.adapter is None:
            raise ApiError(400, f"{body.lora_name} is no adapter", param="lora_name")
        del service.models[body.lora_name]
        try:
            await service.engine.unload_adapter(model.adapter)
        except SwiftError as error:
            raise from_swift_error(error, "lora_name") from error
        return {"status": "unloaded", "model": body.lora_name}

    return routes


def _token_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text, or of a conversation up to where the answer begins."""
        model = service.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give a prompt or messages, one of them", param="prompt")
        if body.messages is not None:
            messages, tools = messages_of(body.messages), tools_of(body.tools)
            check_unicode(json.dumps([messages, tools], ensure_ascii=False))
            tokens = await service.working(0, lambda: model.template.encode_prompt(messages, tools or None))
        elif body.add_special_tokens:
            tokens = await encode_text(service, model, body.prompt or "")
        else:
            check_unicode(body.prompt or "")
            tokens = service.tokenizer.encode(body.prompt, add_special_tokens=False)
        strings = service.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": service.engine.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }

    @routes.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens, control tokens included."""
        service.model(body.model)
        tokens = check_tokens(service, body.tokens)
        return {"prompt": service.tokenizer.decode(tokens, skip_special_tokens=False)}

    return routes


def _told(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": service.owned_by,
        "root": str(model.folder),
        "parent": model.parent,
        "max_model_len": service.engine.max_model_len,
    }
