"""The application: all routes of a service behind its gate. The interactive description is at ``/docs``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from swift.inference.server.admin import admin_routes
from swift.inference.server.chat import chat_routes
from swift.inference.server.completions import completion_routes
from swift.inference.server.errors import ApiError, from_validation
from swift.inference.server.http import Gate, fault_of, log_fault, refusal, request_id
from swift.inference.server.pooling import pooling_routes
from swift.inference.server.service import Service

__all__ = ["create_app"]

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "This model cannot do what is asked."),
        (401, "The API key is missing or wrong."),
        (403, "The server was started without it."),
        (404, "No such model."),
        (413, "The body is too large."),
        (422, "The body does not fit the schema."),
        (429, "The queue is full; see Retry-After."),
        (500, "A fault of the server; its id is in the log."),
        (503, "The server is starting or going down."),
        (504, "A deadline passed; the message names the stage."),
    )
}


def create_app(service: Service, *, keys: Sequence[str] = (), verbose: bool = False) -> ASGIApp:
    """The whole server as an ASGI application.

    Args:
        keys: API keys; none: everybody may ask.
        verbose: log each request.
    """
    from importlib.metadata import version

    # FastAPI hides this from whoever builds schemas early; ours are built by the first request that needs them.
    warnings.filterwarnings("ignore", message="The 'alias' attribute with value 'body'")
    app = FastAPI(title="swift deploy", version=version("swift-forge"), responses=_REFUSALS)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def does_not_fit(request: Request, error: RequestValidationError) -> Response:
        return refusal(from_validation(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        said = {404: f"there is no route {path}", 405: f"{path} does not take {request.method}"}
        answer = refusal(ApiError(error.status_code, said.get(error.status_code, str(error.detail))))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        log_fault(request.scope)
        return refusal(fault_of(request_id(request)))

    for routes in (chat_routes, completion_routes, pooling_routes, admin_routes):
        app.include_router(routes(service))
    return Gate(app, service, keys, verbose)
