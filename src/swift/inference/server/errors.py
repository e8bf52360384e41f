"""Refusals with OpenAI's error body, and which status code what gets.

400: the request is understood but cannot be answered by this model (too long, a bad grammar, tools it does not know,
not JSON); 401: the key; 404: model or route; 413: the body; 422: the body does not fit the schema (a missing field, a
wrong type, a value out of range); 429: the queue is full; 499: the client has gone; 500: our fault, with an id that
is also in the log; 503: starting, draining, or the engine does not answer; 504: a deadline.
"""

from __future__ import annotations

from typing import Any

from swift.core.errors import SwiftError, TransientError
from swift.inference.engines.base import EngineBusy

__all__ = ["ApiError", "check_unicode", "error_body", "from_swift_error", "from_validation"]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is a refusal.

    Args:
        status: of HTTP.
        message: for the user of the client.
        code: a word that programs look at (``context_length_exceeded``).
        param: the field of the request that is to blame.
        retry_after_seconds: becomes a header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return error_body(self.status, self.message, code=self.code, param=self.param)


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_swift_error(error: SwiftError, param: str | None = None) -> ApiError:
    """What the engine, the template or an adapter refuses is the request's fault (``param``: the field of it), but
    for a full queue and an engine that is going down or does not answer."""
    if isinstance(error, EngineBusy):
        return ApiError(429, f"too many requests wait already: {error.message}", retry_after_seconds=1)
    if isinstance(error, TransientError):
        return ApiError(503, error.message, retry_after_seconds=5)
    where = f"{error.where}: " if error.where else ""
    why, fix = f" ({error.why})" if error.why else "", f"; {error.fix}" if error.fix else ""
    return ApiError(400, f"{where}{error.message}{why}{fix}", param=param)


def from_validation(errors: list[Any]) -> ApiError:
    """The first thing that does not fit the schema, and how many there are."""
    first = errors[0]
    # Where a field takes several forms, the form that was meant has the fault that is not of type.
    same = [error for error in errors if error["loc"][:2] == first["loc"][:2]]
    first = next((error for error in same if not error["type"].endswith("_type")), first)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    said = "is not an option of this route" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(422, f"{place}: {said}{more}", param=place, code="invalid_value")


def check_unicode(*texts: str) -> None:
    """Raise ApiError for texts with halves of surrogate pairs, which JSON can write and no tokenizer can read."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"the text is not valid Unicode: {error.reason}", code="invalid_value") from error
