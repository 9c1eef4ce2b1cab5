"""The one table between our errors and HTTP, in the shape that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from treecast.errors import (
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    NotServed,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RetryableError,
    TreecastError,
    Unauthenticated,
    Unavailable,
)


class RefusedField(InvalidRequest):
    """A field of a request is unknown, not supported here, or has a bad value.

    Attributes:
        field: its name.
        code: OpenAI's word for what is wrong with it.
    """

    def __init__(self, message: str, field: str, code: str) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class BodyTooLarge(InvalidRequest):
    """A body has more bytes than are read."""


class BodyTooSlow(InvalidRequest):
    """A body did not arrive in time."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"

_ANSWERS: dict[type[Exception], _Answer] = {
    BodyTooLarge: _Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _INVALID),
    BodyTooSlow: _Answer(HTTPStatus.REQUEST_TIMEOUT, _INVALID),
    PromptTooLong: _Answer(HTTPStatus.BAD_REQUEST, _INVALID, "context_length_exceeded"),
    InvalidRequest: _Answer(HTTPStatus.BAD_REQUEST, _INVALID),
    NotServed: _Answer(HTTPStatus.NOT_FOUND, _INVALID, "model_not_found"),
    DuplicateRequest: _Answer(HTTPStatus.CONFLICT, _INVALID),
    Unauthenticated: _Answer(HTTPStatus.UNAUTHORIZED, _INVALID, "invalid_api_key"),
    PermissionDenied: _Answer(HTTPStatus.FORBIDDEN, _INVALID, "permission_denied"),
    Cancelled: _Answer(HTTPStatus.CONFLICT, _INVALID, "cancelled"),
    DeadlineExceeded: _Answer(HTTPStatus.GATEWAY_TIMEOUT, "server_error", "deadline_exceeded"),
    Overloaded: _Answer(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded"),
    Unavailable: _Answer(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "unavailable"),
    Exception: _Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
}


def error_body(error: Exception) -> dict[str, Any]:
    """`{"error": ...}`; what an error that is not ours says stays here."""
    answer = _answer_of(error)
    return {
        "error": {
            "message": error.message if isinstance(error, TreecastError) else "internal error",
            "type": answer.type,
            "param": error.field if isinstance(error, RefusedField) else None,
            "code": error.code if isinstance(error, RefusedField) else answer.code,
        }
    }


def error_response(error: Exception) -> JSONResponse:
    """The whole answer to a request that produced nothing; says when to come again."""
    headers = {}
    if isinstance(error, Cancelled | DuplicateRequest):
        headers = {"x-should-retry": "false"}  # OpenAI's client asks again after a 409 by itself
    if isinstance(error, RetryableError):
        headers = {
            "retry-after": str(max(1, round(error.retry_after_s))),
            "retry-after-ms": str(round(error.retry_after_s * 1000)),
        }
    return JSONResponse(error_body(error), _answer_of(error).status, headers)


def plain_error(status: int, message: str) -> JSONResponse:
    """For what never became a request: a path or a method that is not there."""
    body = {"message": message, "type": _INVALID, "param": None, "code": None}
    return JSONResponse({"error": body}, status)


def _answer_of(error: Exception) -> _Answer:
    return next(_ANSWERS[base] for base in type(error).__mro__ if base in _ANSWERS)
