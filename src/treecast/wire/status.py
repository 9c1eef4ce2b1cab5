"""The one table between our errors and gRPC status codes; no other file names a code.

A status carries `google.rpc.ErrorInfo` with our stable reason, and `RetryInfo` when trying again
may help.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from treecast.errors import (
    Cancelled,
    CorpusError,
    DeadlineExceeded,
    DuplicateRequest,
    EngineLost,
    HandedOver,
    InvalidFrame,
    InvalidRequest,
    InvalidTree,
    ModelError,
    NotServed,
    Overloaded,
    PeerMismatch,
    PermissionDenied,
    PromptTooLong,
    QuotaExceeded,
    RetryableError,
    SettingsError,
    StaleLease,
    TreecastError,
    Unauthenticated,
    Unavailable,
)
from treecast.wire.frames import BadFrame

DOMAIN = "treecast"

_DETAILS_KEY = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES = 1200
"""Trailing metadata has 8 KB in all, and a message is in it twice: three bytes for each that is not
printable ASCII, and in base64.
"""
_MAX_RETRY_S = 3600.0

log = structlog.get_logger()

_CODES: dict[type[TreecastError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PromptTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidTree: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidFrame: grpc.StatusCode.INTERNAL,  # of our own processes, never of a client
    NotServed: grpc.StatusCode.NOT_FOUND,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    PeerMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    SettingsError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    CorpusError: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    StaleLease: grpc.StatusCode.ABORTED,
    Cancelled: grpc.StatusCode.CANCELLED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RetryableError: grpc.StatusCode.UNAVAILABLE,
    HandedOver: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,  # after its base: it owns the reason they share
    EngineLost: grpc.StatusCode.INTERNAL,
    TreecastError: grpc.StatusCode.INTERNAL,
}

_BY_REASON = {error.reason: error for error in _CODES}

# For a status that is not ours: from gRPC itself, or from a proxy in between.
_BY_CODE: dict[grpc.StatusCode, type[TreecastError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotServed,
    grpc.StatusCode.UNIMPLEMENTED: NotServed,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code of an error of ours, or of its nearest base in the table; INTERNAL for others."""
    return next(_CODES[base] for base in type(_ours(error)).__mro__ if base in _CODES)


def to_rpc_status(error: BaseException) -> Status:
    """Translate an error; one that is not ours becomes "internal error", whatever it says."""
    ours = _ours(error)
    status = Status(code=code_of(ours).value[0], message=_cut(ours.message))
    status.details.add().Pack(ErrorInfo(reason=ours.reason, domain=DOMAIN))
    if isinstance(ours, RetryableError):
        delay = Duration()
        delay.FromMilliseconds(round(ours.retry_after_s * 1000))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def _cut(message: str) -> str:
    return message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")


def _ours(error: BaseException) -> TreecastError:
    if isinstance(error, BadFrame):
        return error.cause
    if isinstance(error, DecodeError):
        return InvalidRequest("a message cannot be parsed")
    return error if isinstance(error, TreecastError) else TreecastError("internal error")


def from_rpc_status(status: Status) -> TreecastError:
    """Translate a status; without a reason of ours, by its code."""
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details[:8]:
        _unpack(detail, info)
        _unpack(detail, retry)
    known = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    kind = known or _kind_of(status.code, status.message)
    message = _cut(status.message)
    if issubclass(kind, RetryableError):
        return kind(message, _bounded(retry.retry_delay))
    return kind(message)


def _unpack(detail: object, into: ErrorInfo | RetryInfo) -> None:
    try:
        detail.Unpack(into)  # type: ignore[attr-defined]
    except DecodeError:
        into.Clear()


def _bounded(delay: Duration) -> float:
    delay_s = delay.seconds + delay.nanos / 1e9
    return min(delay_s, _MAX_RETRY_S) if delay_s > 0 else 1.0


def _kind_of(code: int, message: str) -> type[TreecastError]:
    by_number = {known.value[0]: known for known in grpc.StatusCode}
    known = by_number.get(code, grpc.StatusCode.UNKNOWN)
    if known is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequest  # gRPC's own refusal of a message over the size cap
    return _BY_CODE.get(known, TreecastError)


def from_rpc_error(error: grpc.RpcError) -> TreecastError:
    """Translate what a call raised; a status without details maps by its code."""
    call: grpc.Call = error  # type: ignore[assignment]
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_rpc_status(Status.FromString(value))
            except DecodeError:
                log.warning("unreadable status details", num_bytes=len(value))
    return from_rpc_status(Status(code=call.code().value[0], message=call.details() or ""))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a call with an error; one that is not ours is logged and its text kept from the peer.

    Raises:
        grpc.aio.AbortError: always; gRPC expects it to pass through the handler.
    """
    if not isinstance(error, TreecastError | DecodeError):
        log.error("unexpected error in a call", exc_info=error)
    status = to_rpc_status(error)
    details = ((_DETAILS_KEY, status.SerializeToString()),)
    try:
        await context.abort(code_of(error), status.message, details)
    except grpc.aio.InternalError:  # the call is over already: there is nobody to tell
        raise grpc.aio.AbortError from None
    raise AssertionError("abort returned")
